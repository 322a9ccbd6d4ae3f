"""From a configuration or a run's folder to a model."""

import dataclasses
from pathlib import Path

from safr_fast.data.vocabulary import Vocabulary
from safr_fast.nn import SAFRClassifier, TransformerClassifier
from safr_fast.training.config import ModelConfig, TrainConfig
from safr_fast.training.errors import RunError
from safr_fast.training.protocol import PROTOCOLS
from safr_fast.training.run import RunFolder


def build_model(vocabulary: int, config: ModelConfig, *, pads_count: bool = False) -> TransformerClassifier:
    """The classifier of a configuration, for a vocabulary of that many word types."""
    sizes = dataclasses.asdict(config) | {"pads_count": pads_count}
    gate, mask_hidden = sizes.pop("gate"), sizes.pop("mask_hidden")
    if gate:
        return SAFRClassifier(vocabulary, mask_hidden=mask_hidden, **sizes)
    return TransformerClassifier(vocabulary, **sizes)


def load_run(path: str | Path) -> tuple[TransformerClassifier, Vocabulary, TrainConfig]:
    """The tested epoch's model of a run, in evaluation mode on the CPU, with its vocabulary and configuration."""
    folder = RunFolder(Path(path))
    config = folder.stored_config()
    weights = folder.load_model()
    vocabulary = folder.load_vocabulary()
    model = build_model(len(vocabulary), config.model, pads_count=PROTOCOLS[config.protocol].pads_count)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        files = ", ".join(file.name for file in (folder.model_file, folder.vocabulary_file, folder.config_file))
        raise RunError(f"{files} in {folder.path} are not of one run: put back copies of all three ({error})") from None
    return model.eval(), vocabulary, config
