"""What training minimises, of logits and soft targets."""

import math
from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F


def binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of each class, summed over the classes: the mean over the batch, from float32 [B, C] each.

    Wightman et al. (2021, "ResNet strikes back"); soft targets stay as they are. Logits count from log(1 / C), so that training starts
    as if each class were seen once in C images (Lin et al., 2017), near cross-entropy's log C and not at C log 2: the LR finder needs
    losses that fall little by little. Softmax does not see the offset.
    """
    images, classes = logits.shape
    return F.binary_cross_entropy_with_logits(logits - math.log(classes), targets, reduction="sum") / images


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ce": F.cross_entropy, "bce": binary_cross_entropy}
