"""Two endless data sets as one, in exact shares, each sample with the weight of its part's loss."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

from torch.utils.data import Dataset

from imagen_lightning.data.captions import captions_of
from imagen_lightning.data.dataset import Sample
from imagen_lightning.errors import InputError

_MAX_DENOMINATOR = 1000


def exact_share(share: float) -> Fraction:
    """The share as the fraction that it was meant as: 0.3 is 3/10.

    Raises:
        InputError: it is not above 0 and below 1.
    """
    if not 0 < share < 1:
        raise InputError(f"share {share} of instance samples must lie above 0 and below 1")
    found = Fraction(share).limit_denominator(_MAX_DENOMINATOR)
    if not 0 < found < 1:
        raise InputError(f"share {share} of instance samples must be at least {1 / _MAX_DENOMINATOR:g} from 0 and 1")
    return found


class PriorMixture(Dataset[Sample]):
    """Instance and class samples by position: DreamBooth with prior preservation.

    Of any n positions in a row, n * share are of the instances, to within one; which, depends on the position alone, so
    that neither batch size nor processes, workers or a resume change what comes. Where a batch's size times the share
    is whole, every batch has exactly that many instance samples.

    The loss of Ruiz et al. 2022 (arXiv 2208.12242, eq. 2) is the mean over the instances plus lambda times the mean
    over the class images. The mean over all samples of weight times loss is that with weight 1 / share on instance
    samples and lambda / (1 - share) on class samples.

    Args:
        instance: by position, endless.
        prior: likewise, the class images.
        share: of instance samples, in (0, 1).
        prior_weight: lambda.
    """

    def __init__(self, instance: Dataset[Sample], prior: Dataset[Sample], share: Fraction, prior_weight: float) -> None:
        self.instance = instance
        self.prior = prior
        self.share = share
        self.instance_weight = float(1 / share)
        self.class_weight = float(prior_weight / (1 - share))

    def __getitem__(self, position: int) -> Sample:
        is_instance, number = self.place(position)
        sample = (self.instance if is_instance else self.prior)[number]
        weight = self.instance_weight if is_instance else self.class_weight
        # Stored states are left aside: class images have none, and a batch has all or none.
        return replace(sample, position=position, weight=weight, text=None, empty=None)

    def place(self, position: int) -> tuple[bool, int]:
        """Whether a position is of the instances, and its number among theirs or among the class samples'."""
        numerator, denominator = self.share.numerator, self.share.denominator
        before, after = (place * numerator // denominator for place in (position, position + 1))
        return (True, before) if after > before else (False, position - before)

    def captions(self) -> list[str]:
        """Every caption that a sample may have."""
        return [*captions_of(self.instance), *captions_of(self.prior)]
