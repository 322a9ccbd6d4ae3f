"""Labelled texts: generated ones with a known truth, SST-2 and IMDB; words to numbers; batches.

:mod:`safr_fast.data.batches` holds what needs torch.
"""

from safr_fast.data.corpus import Corpus, DataUnavailable, Split, Truth
from safr_fast.data.sources import DATASETS, check, load
from safr_fast.data.synthetic import synthetic
from safr_fast.data.vocabulary import Vocabulary

__all__ = ["DATASETS", "Corpus", "DataUnavailable", "Split", "Truth", "Vocabulary", "check", "load", "synthetic"]
