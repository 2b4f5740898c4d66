"""What `fit` takes: DataLoaders and bare teachers train; what cannot be trained is one line, before anything is."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from pursuhint_lib.data import Batches, ImageSet
from pursuhint_lib.entry import LoaderBatches
from pursuhint_lib.features import FrozenTeacher, layer_table
from pursuhint_lib.hints import HintPair
from pursuhint_lib.learners import Distilled, Hint, Supervised, seeded
from pursuhint_lib.models import state_hash
from pursuhint_lib.training import Schedule, fit, predict

N, CLASSES = 24, 3
ONCE = Schedule("fast", 1, 0.05)


class Net(nn.Module):
    def __init__(self, classes=CLASSES, wrap=lambda logits: logits, dropout=0.0):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(dropout))
        self.head = nn.Linear(4, classes)
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(self.head(self.first(x).mean((2, 3))))


def net(seed=0, **options):
    with seeded(seed):
        return Net(**options)


def data(labels=torch.arange(N) % CLASSES):
    images = torch.randint(0, 256, (N, 1, 6, 6), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return ImageSet(images, labels, ["a", "b", "c"])


def batches(**options):
    return Batches(data(), 8, mean=[0.5], std=[0.25], **options)


class Noisy(Dataset):
    """Images as `Batches` gives them, in dicts, with noise by torch's generator."""

    def __init__(self, noise=0.0, labels=torch.arange(N) % CLASSES):
        self.images, self.labels, self.noise = (data().images / 255 - 0.5) / 0.25, labels, noise

    def __len__(self):
        return N

    def __getitem__(self, i):
        image = self.images[i]
        return {"pixel_values": image + self.noise * torch.randn_like(image), "label": int(self.labels[i])}


def loader(shuffle=True, noise=0.5, **options):
    return DataLoader(Noisy(noise), 8, shuffle=shuffle, **options)


def distilled(network=None, hint="", **options):
    table = layer_table(net(), ["first"], (1, 6, 6))
    hints = [Hint(hint, [HintPair("first", "first")], 1.0)] if hint else []
    options = {"ce_weight": 1.0, "logit_weight": 1.0, "temperature": 2.0, "hints": hints, **options}
    return Distilled(network or net(), teacher_table=table, student_table=table, labels=data().labels, **options)


def trained(source, schedule=ONCE, learners=None, **options):
    """The history, without times, and what the networks are afterwards."""
    learners = learners or {"a": Supervised(net(dropout=0.3))}
    history = fit(learners, source, schedule, **options).drop(columns=["seconds", "finished"])
    return history, {name: state_hash(learner) for name, learner in learners.items()}


def test_a_data_loader_trains_as_batches_do():
    loaded = loader(shuffle=False, noise=0.0)
    ours = trained(batches(), learners={"a": Supervised(net())}, validation=batches())[0]
    theirs = trained(loaded, learners={"a": Supervised(net())}, validation=loaded)[0]
    columns = ["loss", "val_loss", "val_accuracy"]
    assert theirs[columns].to_numpy() == pytest.approx(ours[columns].to_numpy(), rel=1e-4)
    assert torch.equal(predict(net(), loader(shuffle=False))[1], data().labels)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_data_loader_draws_depends_on_the_seed_and_the_epoch_alone(workers):
    def drawn(seed, epoch):
        torch.manual_seed(seed)
        source = LoaderBatches(loader(num_workers=workers), torch.device("cpu"))
        torch.manual_seed(99)
        state = torch.get_rng_state()
        passed = []
        for batch in source.epoch(epoch):
            assert torch.equal(torch.get_rng_state(), state), "others draw as if there were no loader"
            torch.rand(3)
            state = torch.get_rng_state()
            passed.append(batch.images)
        return torch.cat(passed)

    assert torch.equal(drawn(1, 0), drawn(1, 0))
    assert not torch.equal(drawn(1, 0), drawn(1, 1)) and not torch.equal(drawn(1, 0), drawn(2, 0))


def test_a_training_on_a_data_loader_is_the_same_alone_in_company_and_taken_up_again(tmp_path):
    def run(names, **options):
        torch.manual_seed(4)
        learners = {name: Supervised(net(number, dropout=0.3)) for number, name in enumerate("ab") if name in names}
        return trained(loader(), Schedule("fast", 2, 0.05), learners, **options)

    def stop(epoch, rows):
        raise InterruptedError

    whole = run("ab")
    assert set(whole[0]["seed"]) == {4} and run("a")[1]["a"] == whole[1]["a"]
    with pytest.raises(InterruptedError):
        run("ab", checkpoint=tmp_path / "c", on_epoch=stop)
    again = run("ab", checkpoint=tmp_path / "c")
    assert again[0].equals(whole[0]) and again[1] == whole[1]


def test_a_bare_teacher_is_frozen_and_left_as_it_was():
    bare = net(9).train()
    before = state_hash(bare)
    history, hashes = trained(batches(), learners={"a": distilled(hint="at")}, teacher=bare)
    same = trained(batches(), learners={"a": distilled(hint="at")}, teacher=FrozenTeacher(net(9), ["first"]))
    assert hashes == same[1] and state_hash(bare) == before and bare.training and bare.head.weight.requires_grad


@pytest.mark.parametrize("wrap", [lambda y: {"logits": y}, lambda y: (y, y.exp())], ids=["dict", "tuple"])
@pytest.mark.parametrize("hint", ["", "at"])
def test_networks_that_return_more_than_logits_teach_learn_and_are_tested(wrap, hint):
    plain, wrapped = (
        trained(batches(), learners={"a": distilled(net(**more), hint)}, teacher=net(9, **more), validation=batches())
        for more in ({}, {"wrap": wrap})
    )
    assert wrapped[0].equals(plain[0]) and wrapped[1] == plain[1]


def test_a_last_batch_of_one_image_is_tested_and_not_trained_on():
    class Vectors(Net):
        def forward(self, x):
            return self.head(self.norm(self.first(x).mean((2, 3))))

    network = Vectors()
    network.norm = nn.BatchNorm1d(4)
    source = DataLoader(Subset(Noisy(), range(9)), 8)
    history = fit({"a": Supervised(network)}, source, ONCE, validation=source)
    assert history["status"].tolist() == ["trained"] and len(predict(network, source)[1]) == 9


class Endless(IterableDataset):
    def __iter__(self):
        return iter(Noisy())


def of(labels):
    return DataLoader(Noisy(labels=torch.as_tensor(labels).expand(N)), 8)


@pytest.mark.parametrize(
    ("learner", "options", "says"),
    [
        (net, {}, "learner 'a' is a Net: pass Supervised(network), or Distilled(network, ...)"),
        (distilled, {}, "learner 'a' learns from a teacher: pass teacher=FrozenTeacher"),
        (distilled, {"teacher": "resnet8"}, "str cannot be looked into: pass a torch.nn.Module"),
        (distilled, {"teacher": net(classes=7)}, "student and teacher know 3 and 7 classes"),
        (distilled, {"teacher": net().half()}, "the teacher fails on images float32 (8, 1, 6, 6)"),
        (lambda: Supervised(net().half()), {}, "learner 'a' fails on images float32 (8, 1, 6, 6)"),
        (lambda: Supervised(net().half()), {"batches": loader()}, "learner 'a' fails on images float32 (8, 1, 6, 6)"),
        (lambda: Supervised(net(classes=2)), {}, "learner 'a' knows classes 0 to 1, and a label is 2"),
        (lambda: Supervised(net(classes=2)), {"batches": of(2)}, "a label is 2, and classes 0 to 1 are known"),
        (lambda: Supervised(net()), {"validation": of(3)}, "a label is 3, and classes 0 to 2 are known"),
        (lambda: Supervised(net(classes=1)), {"batches": of(0)}, "learner 'a' knows one class only"),
        (lambda: Supervised(net().requires_grad_(False)), {}, "none of its parameters can learn"),
        (lambda: Supervised(net()), {"batches": []}, "batches give no batch"),
        (lambda: Supervised(net()), {"validation": []}, "validation gives no batch"),
        (
            lambda: Supervised(net()),
            {"validation": [(torch.zeros(2, 3, 6, 6), torch.zeros(2, dtype=torch.int64))]},
            "in validation, fails on images float32 (2, 3, 6, 6)",
        ),
        (lambda: Supervised(net()), {"batches": iter([])}, "without a length"),
        (lambda: Supervised(net()), {"batches": DataLoader(Endless(), 8)}, "a DataLoader without a length"),
        (lambda: Supervised(net()), {"batches": TensorDataset(torch.zeros(8, 1, 6, 6))}, "which has no labels"),
        (lambda: distilled(hint="crd"), {"batches": loader(), "teacher": net()}, "remembers what each image was"),
        (
            lambda: distilled(net(classes=2), logit_loss="dkd_std"),
            {"batches": of(1), "teacher": net(classes=2)},
            "standardized logits of two classes",
        ),
    ],
)
def test_what_cannot_be_trained_is_one_line_before_anything_is(learner, options, says):
    learner, healthy = learner(), Supervised(net())
    before = state_hash(healthy), state_hash(learner)
    with pytest.raises((TypeError, ValueError)) as error:
        fit({"first": healthy, "a": learner}, **{"batches": batches(), "schedule": ONCE} | options)
    assert says in str(error.value) and "\n" not in str(error.value)
    assert (state_hash(healthy), state_hash(learner)) == before


def test_several_processes_do_not_train_on_a_data_loader(monkeypatch):
    monkeypatch.setattr("pursuhint_lib.parallel.size", lambda: 2)
    with pytest.raises(TypeError, match=r"several processes train on data\.Batches"):
        fit({"a": Supervised(net())}, loader(), ONCE)


@pytest.mark.parametrize("again", [lambda learner: learner, lambda learner: Supervised(learner.model)])
def test_learners_that_share_weights_are_refused(again):
    learner = Supervised(net())
    with pytest.raises(ValueError, match="'a' and 'b' would train the same weights"):
        fit({"a": learner, "b": again(learner)}, batches(), ONCE)


def test_learners_without_names_are_refused():
    with pytest.raises(TypeError, match="must have names"):
        fit(Supervised(net()), batches(), ONCE)
