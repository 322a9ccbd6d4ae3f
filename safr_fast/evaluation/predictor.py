"""A trained classifier as a predict function."""

from collections.abc import Sequence

import torch
from torch import Tensor

from safr_fast.data.vocabulary import Vocabulary
from safr_fast.evaluation.deletion import Words
from safr_fast.evaluation.encoding import Encoded
from safr_fast.nn import TransformerClassifier
from safr_fast.training.config import TrainConfig
from safr_fast.training.protocol import PROTOCOLS


class Predictor:
    """Class probabilities of texts, float64 ``(texts, classes)``, by a run's model under its own protocol.

    Texts that are the same to the model are predicted once: variants of one text often are.
    """

    def __init__(self, model: TransformerClassifier, vocabulary: Vocabulary, config: TrainConfig) -> None:
        self.model, self.vocabulary = model.eval(), vocabulary
        self.max_len = config.max_len or None
        self.width = PROTOCOLS[config.protocol].width(config.max_len)

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Texts as the model reads them."""
        return Encoded.of(texts, self.vocabulary, self.max_len, self.width)

    def __call__(self, texts: Sequence[Words]) -> Tensor:
        window = slice(self.max_len)
        number: dict[tuple[str, ...], int] = {}
        rows = [number.setdefault(tuple(words[window]), len(number)) for words in texts]
        encoded = self.encode([" ".join(words) for words in number])
        device = self.model.classify.weight.device
        probabilities = torch.zeros(len(encoded), self.model.classify.out_features, dtype=torch.float64)
        with torch.inference_mode():
            for batch_rows in encoded.batches():
                batch = encoded.batch(batch_rows).to(device)
                logits: Tensor = self.model(batch.ids, batch.mask).logits
                probabilities[batch_rows] = logits.double().softmax(1).cpu()
        return probabilities[rows]
