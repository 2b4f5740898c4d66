"""The figures of a study's page: which, where, and how to read them."""

import base64
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pursuhint_lib.facts import Facts


class Figure(NamedTuple):
    """A figure by the stage and name of its file, and the page's section that shows it.

    reading: how to read it; the caption and, with the title, the text for readers who cannot see it.
    """

    stage: str
    name: str
    section: str
    title: str
    reading: str


FIGURES = (  # in the order of the page
    Figure(
        "05_evaluate",
        "accuracy",
        "results",
        "Test accuracy, seed by seed",
        "A dot per seed and a bar at the mean. Where the dots of two arms overlap, look at the paired differences.",
    ),
    Figure(
        "05_evaluate",
        "differences",
        "results",
        "Paired differences to students without hints",
        "Each arm minus kd, which takes no hints, of the same seed: mean and interval. An interval across zero cannot "
        "tell the two apart.",
    ),
    Figure(
        "04_distill_students",
        "curves",
        "results",
        "Training curves",
        "How training went, epoch by epoch: a line per arm, or per method where there are many arms, is the mean of "
        "its students, the band spans them all. The last epoch counts, not the best one.",
    ),
    Figure(
        "05_evaluate",
        "forest",
        "comparisons",
        "Clustered hints against every control",
        "Clustered minus control, paired by seed: mean and interval. Right of zero the clustered layers were better. "
        "An interval across zero cannot tell the two apart.",
    ),
    Figure(
        "02_profile_layers",
        "similarity",
        "layers",
        "How alike the teacher's layers are",
        "Both axes count the candidate layers by depth; 1 means alike, 0 means unrelated. "
        "A bright block is a run of layers that say much the same.",
    ),
    Figure(
        "03_cluster_layers",
        "clusters",
        "layers",
        "The layers in clusters",
        "One color per cluster, numbered by depth; a star marks the hint point, the layer that stands for its cluster.",
    ),
    Figure(
        "03_cluster_layers",
        "strategies",
        "layers",
        "Hint points by strategy",
        "A row per strategy on one depth axis, a dot per hint point. Rows that look alike are near-equal choices.",
    ),
    Figure(
        "03_cluster_layers",
        "measures",
        "stability",
        "The same clustering under every measure",
        "A row per measure, a color per cluster, stars on hint points, lines between the network's stages. "
        "Rows that look alike are measures whose choice does not matter.",
    ),
    Figure(
        "03_cluster_layers",
        "agreement",
        "stability",
        "How firm the clusters are",
        "What else could have been: other images, fewer images, another measure, another teacher, no training at all. "
        "1 means that the clusters stay the same, 0 that they agree as by chance; a dot is one comparison, a bar the "
        "mean.",
    ),
    Figure(
        "05_evaluate",
        "landscape",
        "landscape",
        "All subsets, ranked",
        "Mean accuracy for every subset of layers, worst to best, with the named choices marked; in the shaded band "
        "they would lie if only the seeds differed. The "
        "flatter it is beside the noise of the seeds, the less the choice matters.",
    ),
    Figure(
        "05_evaluate",
        "layer_effects",
        "landscape",
        "What each layer adds",
        "Mean accuracy of the subsets that hold a layer minus that of those that do not, by depth of the layer: first "
        "of all hints, then as the first, second, ... hint. Of so many intervals some miss zero by chance.",
    ),
    Figure(
        "05_evaluate",
        "positions",
        "landscape",
        "One hint at every depth",
        "Accuracy of students with a single hint, by depth of the hinted layer, mean and interval.",
    ),
    Figure(
        "05_evaluate",
        "measures",
        "measures",
        "Calibration and agreement",
        "How well a student knows how sure it may be, and how often it answers as its teacher does, arm by arm.",
    ),
    Figure(
        "05_evaluate",
        "student_similarity",
        "measures",
        "Students beside the teacher",
        "How alike each student's layers are to the teacher's: did hints make them more alike?",
    ),
    Figure(
        "05_evaluate",
        "alike",
        "measures",
        "Does it pay to be alike?",
        "A dot per student: how alike its hinted layers are to their hint points, against its accuracy. What is common "
        "to an arm's students may come from the arm, not from being alike.",
    ),
)


def shown_figures(facts: Facts, runs: Path, pictures: Mapping[str, Path]) -> list[dict[str, Any]]:
    """The figures that are there, as data URLs with their size in pixels, in the order of FIGURES.

    pictures: name in the report's folder -> file.
    """
    named = {path: name for name, path in pictures.items()}
    about = f"{len(facts.layers)} candidate layers of {facts.teacher['network']}"
    found = []
    for stage, name, section, title, reading in FIGURES:
        path = runs / stage / "figures" / f"{name}.png"
        if path.exists():
            content = path.read_bytes()
            width, height = struct.unpack(">II", content[16:24])  # of the PNG header
            found.append(
                {
                    "stage": stage,
                    "id": f"figure_{stage[:2]}_{name}",
                    "section": section,
                    "title": title,
                    "reading": reading,
                    "alt": f"{title}: study of {about}. {reading}",
                    "url": "data:image/png;base64," + base64.b64encode(content).decode(),
                    "width": width,
                    "height": height,
                    "pdf": named.get(path.with_suffix(".pdf"), ""),
                }
            )
    return found
