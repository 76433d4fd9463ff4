"""Are stored features those that the encoder gives, whoever wrote them and however the writer ended?"""

from __future__ import annotations

import pickle
import sys

import numpy as np
import pytest
import torch

from mllm.connectors import CONNECTORS
from mllm.data.collate import collate
from mllm.encoders import ENCODERS
from mllm.errors import UnavailableError
from mllm.eval.generators.vllm import VLLMGenerator
from mllm.models.configuration_mllm import component_code
from mllm.plugins import content_hash, load_plugins
from mllm.processing.chat import encode_sample
from mllm.processing.images import to_pixels_multi
from mllm.train.features import cache as feature_cache
from mllm.train.features.cache import (
    CachedImageProcessor,
    CachedProcessor,
    Codec,
    FeaturesInPlaceOfPixels,
    FeatureStore,
    check_space,
    fill,
    joining,
    most_views,
    open_stores,
    picture_key,
    view_keys,
    why_not,
)
from mllm.types import IMAGE_MARK, Sample, Turn, Video
from tests.helpers import TINY_CLIP, picture, tiny_model
from tests.unit.models.test_video import TINY_VGGT


@pytest.fixture
def model(tmp_path):
    model = tiny_model(tmp_path / "tokenizer")[0]
    model.requires_grad_(False)
    return model


@pytest.mark.parametrize(("dtype", "error"), [("float32", 0.0), ("bfloat16", 4e-3), ("float16", 5e-4), ("int8", 1e-2)])
def test_features_come_back_within_the_stated_dtype(dtype, error):
    codec = Codec(dtype, 7, 100)
    features = torch.randn(7, 100, generator=torch.Generator().manual_seed(0))
    features[:, 3] *= 30  # one loud channel must not drown the others
    data = codec.encode(features)
    assert len(data) == codec.size
    quiet = [c for c in range(100) if c != 3 and c >= 64]
    found = codec.decode(data).float()
    assert found.shape == (7, 100)
    assert (found - features)[:, quiet].norm() / features[:, quiet].norm() <= error
    assert (found - features).norm() / features.norm() <= 2 * error


def _store(folder, name="s") -> FeatureStore:
    return FeatureStore(folder / name, Codec("float32", 2, 3), {})


def _key(number: int) -> bytes:
    return bytes([number]) * 32


def test_two_writers_and_a_reader_share_a_store(tmp_path):
    reader, first, second = _store(tmp_path), _store(tmp_path), _store(tmp_path)
    first.add([(_key(1), torch.full((2, 3), 1.0))])
    second.add([(_key(2), torch.full((2, 3), 2.0)), (_key(3), torch.full((2, 3), 3.0))])
    first.add([(_key(4), torch.full((2, 3), 4.0))])
    assert len(reader) == 0
    reader.refresh()
    assert [reader.get(_key(k))[0, 0].item() for k in (1, 2, 3, 4)] == [1.0, 2.0, 3.0, 4.0]
    assert pickle.loads(pickle.dumps(reader)).get(_key(3))[1, 2] == 3.0
    with pytest.raises(KeyError):
        reader.get(_key(9))


@pytest.mark.parametrize("damage", ["data cut", "index cut", "index wrong"])
def test_what_a_killed_writer_left_half_is_not_seen_and_the_rest_is(tmp_path, damage):
    writer = _store(tmp_path)
    writer.add([(_key(1), torch.ones(2, 3))])
    writer.add([(_key(2), torch.ones(2, 3))])
    writer.close()
    data, index = (next((tmp_path / "s").glob(f"*.{kind}")) for kind in ("data", "index"))
    if damage == "data cut":
        data.write_bytes(data.read_bytes()[:-5])
    elif damage == "index cut":
        index.write_bytes(index.read_bytes()[:-5])
    else:
        index.write_bytes(index.read_bytes()[:-1] + b"x")
    again = _store(tmp_path)
    assert _key(1) in again and _key(2) not in again
    again.add([(_key(2), torch.full((2, 3), 5.0))])
    assert _store(tmp_path).get(_key(2))[0, 0] == 5.0


def test_stored_features_give_the_same_visual_tokens_as_pixels(tmp_path, model):
    stores = open_stores(model, "float32", root=tmp_path)
    images = [picture(k) for k in range(5)]
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    assert fill(model, stores, [*images, str(broken), images[0]], batch_size=2) == (5, 1)
    assert fill(model, stores, images) == (0, 0)
    specs = {name: info.image for name, info in model.model.vision_tower.infos.items()}
    rows = [to_pixels_multi(image, specs) for image in images]
    live = model.model.encode_images({name: torch.stack([row[name] for row in rows]) for name in specs})[0]
    features = {name: torch.stack([stores[name].get(picture_key(image)) for image in images]) for name in specs}
    with FeaturesInPlaceOfPixels(model):
        cached = model.model.encode_images(features)[0]
    assert (cached - live).abs().max() < 1e-5
    again = model.model.encode_images({name: torch.stack([row[name] for row in rows]) for name in specs})[0]
    assert torch.equal(again, live), "afterwards the encoders take pixels again"


BACKBONES = (
    "biformer", "crossformer", "vssd", "unitranspose", "dualtokenvit", "ddrnet", "channelvit", "crossvit", "unit", "lookupvit",
    "dependencyvit", "vir", "evitpose", "duoformer", "dynperceiver", "snnet", "s4d", "paratranscnn", "samunet", "dbsam",
)  # fmt: skip


def test_every_research_backbones_features_are_stored_as_they_are(tmp_path):
    encoders = {name: {**ENCODERS.get(name).tiny(), "keep_prefix": False} for name in BACKBONES}
    changes = {"encoders": encoders, "connector": {"type": "sequence_concat"}}
    model = tiny_model(tmp_path / "tokenizer", **changes)[0].requires_grad_(False)
    assert why_not(model, ["connector"]) is None
    stores, image = open_stores(model, "float32", root=tmp_path / "stores"), picture(3)
    assert fill(model, stores, [image]) == (1, 0)
    specs = {name: info.image for name, info in model.model.vision_tower.infos.items()}
    pixels = {name: row[None] for name, row in to_pixels_multi(image, specs).items()}
    live = model.model.encode_images(pixels)[0]
    with FeaturesInPlaceOfPixels(model):
        cached = model.model.encode_images({n: stores[n].get(picture_key(image))[None] for n in specs})[0]
    assert (cached - live).abs().max() < 1e-5 * live.abs().max().clamp_min(1)


def test_volumes_of_slices_are_not_stored_picture_by_picture(tmp_path):
    changes = {
        "encoders": {"eyes": {**ENCODERS.get("uni4eye").tiny(), "keep_prefix": False}},
        "connector": {"type": "mlp"},
    }
    model = tiny_model(tmp_path / "tokenizer", **changes)[0].requires_grad_(False)
    assert why_not(model, ["connector"]) == "in encoder eyes the views of a picture see each other"


def test_other_weights_other_dtype_and_another_transform_have_stores_of_their_own(tmp_path, model):
    folders = {store.folder for store in open_stores(model, "float32", root=tmp_path).values()}
    assert folders == {store.folder for store in open_stores(model, "float32", root=tmp_path).values()}
    folders |= {store.folder for store in open_stores(model, "int8", root=tmp_path).values()}
    next(model.model.vision_tower.encoders["semantic"].parameters()).data.mul_(1.001)
    folders |= {store.folder for store in open_stores(model, "float32", root=tmp_path).values()}
    assert len(folders) == 5
    folders |= {store.folder for store in open_stores(model, "float32", resampler="torch", root=tmp_path).values()}
    assert len(folders) == 7, "the resampler decides features too"


def test_learning_encoders_are_not_cached_and_a_full_disk_is_told_before_anything_is_written(
    tmp_path, model, monkeypatch
):
    assert why_not(model, {"connector"}) is None
    assert "encoders.semantic learns" in str(why_not(model, {"encoders.semantic"}))
    stores = open_stores(model, "float32", root=tmp_path)
    check_space(stores, 10)
    with pytest.raises(UnavailableError, match=r"1,000,000,000,000 pictures need .* GB .* MLLM_CACHE"):
        check_space(stores, 10**12)
    monkeypatch.setenv("MLLM_CACHE", str(tmp_path / "elsewhere"))
    assert feature_cache.cache_root() == tmp_path / "elsewhere" / "features"


def test_another_version_of_a_plug_ins_code_has_a_store_of_its_own(model, tmp_path):
    """Same weights, same config, other code: other features."""
    found = []
    for number in (1, 2):
        file = tmp_path / "odd_features.py"
        file.write_text(f"import torch\n\nclass Odd(torch.nn.Identity):\n    factor = {number}\n")
        load_plugins([str(file)])
        (odd,) = [m.Odd for n, m in list(sys.modules.items()) if "odd_features" in n and number == m.Odd.factor]
        model.model.vision_tower.encoders["semantic"].odd = odd()
        found.append(open_stores(model, "float32", root=tmp_path / "stores"))
    one, two = found
    assert one["semantic"].folder != two["semantic"].folder and one["detail"].folder == two["detail"].folder


def test_the_vllm_generators_fingerprint_holds_the_code_of_the_checkpoints_components(model, tmp_path, monkeypatch):
    assert component_code(model.config) == [] and component_code(model.config.text_config) == []
    file = tmp_path / "odd_connector.py"
    file.write_text("class OddConnector:\n    odd = True\n")
    load_plugins([str(file)])
    (connector,) = [module.OddConnector for name, module in list(sys.modules.items()) if "odd_connector" in name]
    monkeypatch.setitem(CONNECTORS._classes, "odd_connector", connector)
    model.config.connector = {"type": "odd_connector"}
    assert component_code(model.config) == [content_hash(file)]
    generator = object.__new__(VLLMGenerator)  # its engine answers; here is only what it is called
    generator._hash, generator._dtype, generator._engine_options = "0", "auto", {}
    generator.processor = None
    names = set()
    for generator._code in ([], component_code(model.config)):
        names.add(generator.fingerprint())
    assert len(names) == 2


@torch.no_grad()
def test_features_of_tiles_are_kept_by_view(tmp_path):
    """As a stage reads them: the same tokens as from the pixels, for encoders that see all tiles and that see the thumbnail."""
    views = {"type": "tiles", "grids": [[1, 2], [2, 2]], "thumbnail_only": ["detail"]}
    model, processor = tiny_model(tmp_path / "tokenizer", views=views)
    model.requires_grad_(False)
    stores = open_stores(model, "float32", root=tmp_path)
    images = [picture(1, size=(80, 30)), picture(2, size=(50, 60)), picture(1, size=(80, 30))]
    assert why_not(model, {"connector"}) is None and most_views(model.model.rules) == {"semantic": 5, "detail": 1}
    assert fill(model, stores, images, batch_size=2) == (2, 0) and fill(model, stores, images) == (0, 0)
    assert len(stores["semantic"]) == 3 + 5 and len(stores["detail"]) == 2
    cached = CachedProcessor(
        processor, CachedImageProcessor(stores, dict(model.model.pixel_keys), torch.float32, model.model.rules)
    )
    sample = Sample("s", [Turn("user", IMAGE_MARK * 3 + " q"), Turn("assistant", "a")], images)
    live, read = (collate([encode_sample(p, sample)], pad_token_id=0).inputs for p in (processor, cached))
    assert torch.equal(live["input_ids"], read["input_ids"]) and torch.equal(live["image_sizes"], read["image_sizes"])
    wanted = model(**live).logits
    with FeaturesInPlaceOfPixels(model):
        found = model(**read).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    shared = tiny_model(tmp_path / "tokenizer", views={"type": "tiles", "max_sample_tokens": 500})[0].requires_grad_(
        False
    )
    assert "depends on its neighbours" in str(why_not(shared, {"connector"}))


FILMS = {
    "frames": {"connector": {"type": "channel_concat"}, "video": {"frames": 4, "fewer": {"detail": 2}}},
    "scene": {
        "encoders": {"semantic": dict(TINY_CLIP), "geometry": dict(TINY_VGGT)},
        "connector": {"type": "spatial_mllm"},
        "video": {"frames": 5, "stamp": "{number} "},
    },
}


@pytest.mark.parametrize("changes", FILMS.values(), ids=list(FILMS))
def test_a_videos_frames_are_stored_with_those_that_they_are_seen_with(tmp_path, monkeypatch, changes):
    """Losses from stored features are those from pixels; the same file with other frames has names of its own."""
    monkeypatch.setenv("MLLM_CACHE", str(tmp_path / "cache"))
    model, processor = tiny_model(tmp_path / "model", **changes)
    model.requires_grad_(False)
    assert why_not(model, []) is None and "learns" in str(why_not(model, ["encoders.semantic"]))
    np.save(tmp_path / "a.npy", np.stack([np.asarray(picture(k)) for k in range(9)]))
    path = str(tmp_path / "a.npy")
    film, part = Video(path, fps=2), Video(path, fps=2, start=2.0)
    samples = [
        Sample(str(k), [Turn("user", f"{IMAGE_MARK * len(shown)}?"), Turn("assistant", "yes")], shown)
        for k, shown in enumerate([[film], [picture(3), part]])
    ]
    with torch.no_grad():
        plain = [collate([encode_sample(processor, one)], pad_token_id=0) for one in samples]
        wanted = [model(**one.inputs).loss for one in plain]
    stores, images = open_stores(model, "float32"), [one for sample in samples for one in sample.images]
    assert fill(model, stores, images) == (3, 0) and fill(model, stores, images) == (0, 0)
    rules, together = model.model.rules, joining(model)
    reader = CachedImageProcessor(stores, dict(model.model.pixel_keys), torch.float32, rules, together)
    cached = CachedProcessor(processor, reader)
    with torch.no_grad(), FeaturesInPlaceOfPixels(model):
        for sample, batch, loss in zip(samples, plain, wanted, strict=True):
            found = collate([encode_sample(cached, sample)], pad_token_id=0)
            assert found.inputs["pixel_values"].dim() == 3
            assert torch.equal(found.inputs["video_times"], batch.inputs["video_times"])
            torch.testing.assert_close(model(**found.inputs).loss, loss, atol=2e-5, rtol=1e-5)
    one, other = (view_keys(clip, rules, together=together) for clip in (film, part))
    assert all(one[name] != other[name] for name in stores), "other frames have other names"
