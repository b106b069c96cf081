"""A data module whose arguments take anything, for tests of how a sweep's values arrive."""

from typing import Any

from lightning.pytorch import LightningDataModule


class TakingAnything(LightningDataModule):
    def __init__(
        self,
        value: Any = 0,
        mapping: dict[str, Any] | None = None,
        entries: list[Any] | None = None,
        text: str = "",
        maybe: str | None = "",
    ) -> None:
        super().__init__()
