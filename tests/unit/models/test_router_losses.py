"""Is it said when a trainer leaves a learning router's own losses out?"""

from __future__ import annotations

import torch

from tests.helpers import TINY_CLIP, picture, tiny_model


def test_a_loss_made_past_forward_is_warned_of_once_and_only_where_a_router_learns(tmp_path, caplog):
    """TRL calls the backbone itself and takes its loss from hidden states."""
    router = {"type": "gate", "experts": ["spatial", "detail"], "hidden": 8, "losses": {"z_loss": 0.1}}
    encoders = {"semantic": dict(TINY_CLIP), "spatial": dict(TINY_CLIP), "detail": dict(TINY_CLIP)}
    model, processor = tiny_model(tmp_path, encoders=encoders, router=router)
    batch = processor(text="<image> what is it?", images=picture(3), return_tensors="pt")
    model.base_model(**batch)  # in evaluation mode there are no such losses
    model.train()
    whole = model(**batch, labels=batch["input_ids"])
    assert whole.routing.losses and not caplog.records
    model.model.vision_tower.router.requires_grad_(False)
    model.base_model(**batch)
    model.model.vision_tower.router.requires_grad_(True)
    with torch.no_grad():
        model.base_model(**batch)
    assert not caplog.records
    for _ in range(2):
        model.base_model(**batch)
    (told,) = [record.getMessage() for record in caplog.records]
    assert "the router's own losses (z_loss) are not part of this training" in told and "freeze it" in told
    caplog.clear()
    model.model._warned_of_lost_losses = False
    model(**batch)  # logits alone: DPO and GRPO
    assert len(caplog.records) == 1
