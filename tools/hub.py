"""Where timm finds the ImageNet weights of a model: the hub's cache, or the hub itself if anybody answers there."""

import contextlib
import urllib.error
import urllib.request

import huggingface_hub
import timm


def locate_weights(name: str) -> dict[str, str] | None:
    """What `timm.create_model(name, pretrained=True, pretrained_cfg_overlay=...)` needs to look in the right place.

    The hub is asked once whether it answers: without network its client would go on trying for most of a minute.

    Args:
        name: a timm model, with or without a weights tag.

    Returns:
        The file in the cache, or None where timm should ask the hub.

    Raises:
        LookupError: timm has no ImageNet weights of this model.
        OSError: they are not in the cache, and the hub does not answer.
    """
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise LookupError(f"timm has no ImageNet weights of {name}")
    cached = huggingface_hub.try_to_load_from_cache(config.hf_hub_id, "model.safetensors") if config.hf_hub_id else None
    if isinstance(cached, str):
        return {"file": cached}
    with contextlib.suppress(urllib.error.HTTPError):  # an answer too
        urllib.request.urlopen(huggingface_hub.constants.ENDPOINT, timeout=10).close()
    return None
