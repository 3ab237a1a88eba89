"""From files to batches on the device."""

from common.data.sources.open import open_dataset
