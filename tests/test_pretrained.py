"""Weights that were trained elsewhere: what is taken, and what is refused in one line."""

import argparse
import urllib.error
import warnings

import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn

from pursuhint_lib import storage
from pursuhint_lib.data import Batches, ImageSet
from pursuhint_lib.models import build_model, load_model, save_model, state_hash
from pursuhint_lib.pretrained import check_source, keep_pretrained, load_weights


def network(classes=5, seed=0):
    torch.manual_seed(seed)
    return build_model("resnet18", classes)


@pytest.fixture(scope="module")
def theirs():
    return network(seed=1)


@pytest.fixture(scope="module")
def state():
    return build_model("resnet8", 5).state_dict()


@pytest.mark.parametrize("name", ["theirs.safetensors", "THEIRS.SAFETENSORS", "theirs.pth.tar", "theirs.CKPT"])
def test_a_state_dict_below_the_home_or_anywhere_is_taken_whatever_its_suffix(home, theirs, name):
    save = safetensors.torch.save_file if "safetensors" in name.lower() else torch.save
    save(theirs.state_dict(), home / name)
    check_source("resnet18", name)
    for source in (name, str(home / name)):
        mine = network()
        assert state_hash(mine) != state_hash(theirs)
        loaded = load_weights(mine.train(), source)
        assert loaded is mine and state_hash(mine) == state_hash(theirs) and not mine.training


def test_weights_from_before_batch_norm_counted_are_taken(home, theirs):
    old = {name: tensor for name, tensor in theirs.state_dict().items() if "num_batches_tracked" not in name}
    torch.save(old, home / "old.pth")
    assert state_hash(load_weights(network(), "old.pth")) == state_hash(theirs)


def converted(dtype):
    return {name: tensor.to(dtype) for name, tensor in network().state_dict().items()}


def test_weights_that_were_halved_as_a_whole_are_taken(home):
    torch.save(converted(torch.half), home / "half.pth")
    assert load_weights(network(), "half.pth").conv1.weight.dtype == torch.float32


def under(prefix, state):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("wrap", "says"),
    [
        (lambda state: state, None),
        (
            lambda state: {"epoch": 240, "model": state, "args": argparse.Namespace(lr=1), "optimizer": {"lr": 1}},
            "model taken of its entries epoch, model, args, optimizer",
        ),
        (lambda state: {"state_dict": state, "best_acc1": torch.tensor(0.7)}, "state_dict taken of its entries"),
        (lambda state: under("module.", state), "prefix module. dropped"),
        (lambda state: under("module._orig_mod.", state), "prefix module._orig_mod. dropped"),
        (lambda state: {"state_dict": under("model.", state)}, "entries state_dict; prefix model. dropped"),
    ],
)
def test_checkpoints_of_training_programs_are_opened_and_a_line_says_how(home, state, wrap, says):
    torch.save(wrap(state), home / "w.pth")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        mine = load_weights(build_model("resnet8", 5), "w.pth")
    assert all(torch.equal(tensor, state[name]) for name, tensor in mine.state_dict().items())
    assert [says in str(warning.message) and "w.pth" in str(warning.message) for warning in said] == [True] * bool(says)


@pytest.mark.parametrize(
    ("name", "heads", "begins"), [("googlenet", "aux1, aux2", "1378be20"), ("inception_v3", "AuxLogits", "0cc3c7bd")]
)
def test_auxiliary_heads_are_left_out_and_input_is_transformed_as_the_weights_want(
    home, monkeypatch, name, heads, begins
):
    trained = torchvision.models.get_model(name, num_classes=2, aux_logits=True, init_weights=False).eval()
    torch.save(trained.state_dict(), home / "w.pth")
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: trained.state_dict())
    images = torch.randn(1, 3, 75, 75)
    with torch.no_grad():
        for source, digest, on in (("w.pth", "0" * 64, False), ("w.pth", begins, True), ("IMAGENET1K_V1", "", True)):
            monkeypatch.setattr(storage, "sha256", lambda path, digest=digest: digest)  # torchvision's own file, or not
            trained.transform_input = on
            expected = trained(images)
            with pytest.warns(UserWarning, match=f"of {heads} left out.*transform_input is {'on' if on else 'off'}"):
                mine = load_weights(build_model(name, 2), source)
            assert torch.equal(mine(images), expected)
            again, _ = load_model(save_model(mine, home / "m.safetensors"))
            assert torch.equal(again(images), expected) and again.spec == mine.spec
    with pytest.raises(ValueError, match="resnet18 cannot transform its input"):
        build_model("resnet18", 2, transform_input=True)


@pytest.mark.parametrize(("value", "says"), [(0.0, "the same for every image"), (torch.nan, "not all finite")])
def test_a_teacher_whose_weights_say_nothing_is_refused_before_anything_is_trained(home, value, says):
    images = ImageSet(torch.randint(255, (8, 3, 32, 32), dtype=torch.uint8), torch.arange(8) % 2, ["a", "b"])
    silent = build_model("resnet8_w4", 2)
    for parameter in silent.parameters():
        nn.init.constant_(parameter, value)
    with pytest.raises(ValueError, match=f"^teacher resnet8_w4: its logits are {says}.*teach nothing") as error:
        keep_pretrained(home, silent, 0, Batches(images, 4, mean=torch.zeros(3), std=torch.ones(3)))
    assert "\n" not in str(error.value) and not list(home.rglob("*.safetensors"))


class Code:
    def __reduce__(self):
        return print, ("this ran",)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (lambda: network(4).state_dict(), r"fc.weight is \(4, 512\) there, \(5, 512\) in the model"),
        (lambda: {"state_dict": {}, "epoch": 3}, "is not a state_dict"),
        (lambda: dict.fromkeys(["model", "ema"], network().state_dict()), r"several state_dicts \(model, ema\)"),
        (lambda: dict.fromkeys([0, 1], network().state_dict()), r"several state_dicts \(0, 1\)"),
        (lambda: converted(torch.int8), "conv1.weight is torch.int8 there, torch.float32 in the model"),
        (lambda: converted(torch.complex64), "conv1.weight is torch.complex64 there, torch.float32 in the model"),
        (lambda: {"fc.weight": Code()}, "weights alone"),
        (network, "weights alone"),
        (b"", "is not a whole file of weights"),
        (b"PK\x03\x04 cut off", "is not a whole file of weights"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "fetch them with git lfs pull"),
    ],
)
def test_what_does_not_fit_or_is_more_than_weights_is_refused(home, content, says, capsys):
    if isinstance(content, bytes):
        (home / "w.pth").write_bytes(content)
    else:
        torch.save(content(), home / "w.pth")
    before = state_hash(mine := network())
    with pytest.raises(ValueError, match=says) as error:
        load_weights(mine, "w.pth")
    assert "\n" not in str(error.value) and "w.pth" in str(error.value)
    assert state_hash(mine) == before and "this ran" not in capsys.readouterr().out


def test_unknown_weights_are_answered_with_those_there_are(home):
    with pytest.raises(FileNotFoundError, match="none.pth are not there"):
        load_weights(network(), "none.pth")
    with pytest.raises(ValueError, match="torchvision has IMAGENET1K_V1, DEFAULT of resnet18"):
        load_weights(network(), "IMAGENET")
    with pytest.raises(ValueError, match="torchvision has none of resnet20"):
        load_weights(build_model("resnet20", 5), "IMAGENET1K_V1")


def test_a_source_is_checked_without_reading_or_downloading_it(home, monkeypatch):
    (home / "w.pth").write_bytes(b"no weights")
    (home / "pointer.pth").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", None)  # a download would fail
    check_source("resnet18", "w.pth")
    check_source("resnet18", "IMAGENET1K_V1")
    for network, source, says in (
        ("resnet18", "none.safetensors", "none.safetensors are not there"),
        ("resnet18", "w.ckpt", "w.ckpt are not there"),
        ("resnet18", "pointer.pth", "fetch them with git lfs pull"),
        ("resnet18", "IMAGENET1K_V2", "torchvision has IMAGENET1K_V1, DEFAULT of resnet18"),
        ("resnet20", "IMAGENET1K_V1", "torchvision has none of resnet20"),
    ):
        with pytest.raises((FileNotFoundError, ValueError), match=says) as error:
            check_source(network, source)
        assert "\n" not in str(error.value)


def test_torchvisions_weights_are_taken_by_name_and_checked_or_said_to_be_out_of_reach(monkeypatch, theirs):
    asked = {}

    def download(url, *_, **options):
        asked.update(options, url=url)
        return theirs.state_dict()

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    assert state_hash(load_weights(network(), "IMAGENET1K_V1")) == state_hash(theirs)
    assert "resnet18" in asked["url"] and asked["check_hash"]

    def closed(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", closed)
    with pytest.raises(FileNotFoundError, match="could not be downloaded from https.*no network.*name it instead"):
        load_weights(network(), "IMAGENET1K_V1")
