"""Every caption that a data set can give, so that their text is encoded once."""

from __future__ import annotations

from typing import Any

from imagen_lightning.errors import InputError


def captions_of(dataset: Any) -> list[str]:
    """The captions of a map-style data set, each once: what its `captions` method lists, else those of its samples.

    A data set that gives its samples stored text states lists none, since nothing encodes them.

    Raises:
        InputError: it is endless and has no such method.
    """
    listed = getattr(dataset, "captions", None)
    if listed is not None:
        return list(dict.fromkeys(listed()))
    try:
        count = len(dataset)
    except TypeError:
        raise InputError(
            f"the captions of {type(dataset).__name__} cannot be listed, for there is no end of them: drop EncodeOnce"
        ) from None
    samples = (dataset[position] for position in range(count))
    return list(dict.fromkeys(sample.caption for sample in samples if sample.image is not None and sample.text is None))
