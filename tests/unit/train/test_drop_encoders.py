"""Does a picture lose at most one encoder, all its views the same one, in training alone, by the shares that were asked for?"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mllm.connectors import CONNECTORS
from mllm.errors import ConfigError
from mllm.recipe import StageSpec
from mllm.train.drop_encoders import DropEncoders
from mllm.train.stages.sft import check_sft
from mllm.types import Block, VisionFeatures, VisualLayout


def _model(experts=(), native=False):
    kind = CONNECTORS.get("channel_concat")
    settings, encoders, width = kind.tiny()
    connector = kind(kind.Config.model_validate({**settings, "feature_norm": "layer_norm"}), encoders, width)
    tower = SimpleNamespace(encoders=dict.fromkeys(encoders), experts=list(experts))
    inner = SimpleNamespace(vision_tower=tower, rules=SimpleNamespace(native=native), multi_modal_projector=connector)
    return SimpleNamespace(model=inner)


def _features(connector, views):
    return {n: VisionFeatures(torch.randn(views, i.num_tokens, i.width), i.grid) for n, i in connector.encoders.items()}


def test_shares_are_kept_and_no_picture_loses_two():
    torch.manual_seed(0)
    model = _model()
    dropping = DropEncoders({"semantic": 0.5, "text": 0.3}, model, "here")
    found = dropping.thinned(_features(model.model.multi_modal_projector, 4000), None)
    lost = {name: (features.tokens == 0).all(dim=(1, 2)) for name, features in found.items()}
    assert abs(float(lost["semantic"].float().mean()) - 0.5) < 0.03
    assert abs(float(lost["text"].float().mean()) - 0.3) < 0.03
    assert not (lost["semantic"] & lost["text"]).any() and not lost["spatial"].any()


def test_all_views_of_a_picture_lose_the_same():
    torch.manual_seed(0)
    model = _model()
    layouts = [VisualLayout((Block(4, (1, 2, 2)),), 1 + k % 3) for k in range(60)]
    features = _features(model.model.multi_modal_projector, sum(layout.num_views for layout in layouts))
    found = DropEncoders({"semantic": 0.5}, model, "here").thinned(features, layouts)
    lost = (found["semantic"].tokens == 0).all(dim=(1, 2)).split([layout.num_views for layout in layouts])
    assert all(len(set(part.tolist())) == 1 for part in lost) and len({bool(part[0]) for part in lost}) == 2


def test_only_in_training_and_behind_the_norm():
    model = _model()
    connector = model.model.multi_modal_projector
    torch.nn.init.ones_(connector.feature_norms["semantic"].bias)  # what is lost must not come back as the norm's bias
    features = _features(connector, 3)
    other = {**features, "semantic": VisionFeatures(torch.randn_like(features["semantic"].tokens), (4, 4))}
    handle = DropEncoders({"semantic": 1.0}, model, "here").attach()
    connector.train()
    torch.testing.assert_close(connector(features), connector(other))
    connector.eval()
    seen = connector(features)
    assert not torch.allclose(seen, connector(other))
    handle.remove()
    connector.train()
    torch.testing.assert_close(connector(features), seen)


@pytest.mark.parametrize(
    ("chances", "changes", "word"),
    [
        ({"objcts": 0.5}, {}, "no encoder 'objcts'"),
        ({"semantic": 0.5}, {"experts": ["semantic"]}, "is an expert"),
        ({"semantic": 0.5}, {"native": True}, "views native"),
    ],
)
def test_what_cannot_be_dropped_is_refused(chances, changes, word):
    with pytest.raises(ConfigError, match=rf"here: .*{word}"):
        DropEncoders(chances, _model(**changes), "here")


@pytest.mark.parametrize(("chances", "word"), [({"a": 1.5}, "no share"), ({"a": 0.6, "b": 0.6}, "sum to 1.2")])
def test_shares_that_cannot_be_are_refused(chances, word):
    stage = StageSpec(name="read", learn={"connector": 1e-3}, data="x", steps=1, options={"drop_encoders": chances})
    with pytest.raises(ConfigError, match=rf"stages\.read\.options\.drop_encoders.*{word}"):
        check_sft(stage)
