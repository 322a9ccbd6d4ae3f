"""What a training run is told, with the released hyper-parameters as defaults."""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from safr_fast.data.sources import Dataset
from safr_fast.training.errors import OptionError

Variant = Literal["released", "paper"]
ProtocolName = Literal["masked", "released"]
# As the back ends' own, which wait for torch.
_Impl = Literal["auto", "reference", "cpp", "triton"]

# What a run takes where it is told nothing else. The weights belong to the variant "released": the paper's for real
# reviews; for generated ones, which are shorter, such that the gate closes on filler and stays open on planted words.
# The released code's means count padding, these do not, so that the paper's weight of 1 presses harder on a real token:
# on SST-2 128 / 19 times. A weight of 0.15 gives each real token its released share.
_OWN: dict[str, dict[str, Any]] = {
    "synthetic": {"epochs": 15, "max_len": 0, "lambda_importance": 0.1, "lambda_interaction": 0.1},
    "sst2": {"epochs": 100, "max_len": 0, "lambda_importance": 1.0, "lambda_interaction": 0.1},
    "imdb": {"epochs": 100, "max_len": 256, "lambda_importance": 0.01, "lambda_interaction": 0.01},
}
# The fixed length of the released protocol: the released code's for real reviews; of generated ones three in a thousand
# are longer.
_RELEASED_LENGTH = {"synthetic": 64, "sst2": 128, "imdb": 256}
# About as many reviews of IMDB as the released batch of 32 has.
_FULL_LENGTH: dict[str, Any] = {"max_len": 0, "batch_tokens": 8192}


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the classifier."""

    gate: bool = True
    """Gate the embeddings by VMASK; without it the model is the plain transformer."""
    dim: int = 256
    """Size of embeddings and of the layers."""
    heads: int = 8
    """Attention heads."""
    feedforward: int = 1024
    """Units of the feed-forward."""
    layers: int = 1
    """Transformer layers."""
    mask_hidden: int = 1024
    """Units of VMASK's hidden layer."""
    dropout: float = 0.1
    """After positions, and on the output of attention and of the feed-forward."""

    def check(self) -> None:
        for name in ("dim", "heads", "feedforward", "layers", "mask_hidden"):
            _at_least(self, name, 1)
        if self.dim % 2 or self.dim % self.heads:
            raise OptionError(f"dim must be even and a multiple of heads, got dim {self.dim} and {self.heads} heads")
        if not 0 <= self.dropout < 1:
            raise OptionError(f"dropout must be in [0, 1), got {self.dropout!r}")


@dataclass(frozen=True)
class TrainConfig:
    """One run."""

    dataset: Dataset = "synthetic"
    """synthetic: generated reviews with a known truth, nothing needed. sst2, imdb: from --data-dir or the hub."""
    protocol: ProtocolName = "masked"
    """masked: padding takes part in nothing, the best epoch is tested. released: as the authors' code, to be compared
    with it: every text is padded to max-len, pads count in pooling and both losses, the last epoch is tested."""
    data_dir: Path | None = None
    """Folder with the data set's files, such as train, validation and test.parquet; without it the Hugging Face hub is
    asked."""
    all_rows: bool = False
    """SST-2: also train and test on rows outside the paper's subset. From the hub it is always all of them."""
    data_seed: int = 0
    """Of the generated reviews, and of IMDB's development split."""
    max_len: int | None = None
    """Tokens kept of each text; 0: all. By default 256 for imdb and all for the others; where the protocol is released,
    which pads every text to it, 128 for sst2 and 64 for synthetic."""
    full_length: bool = False
    """Cut no text, and make batches by tokens: the same as --max-len 0 --batch-tokens 8192. Not with the
    protocol released, which has a fixed length."""
    lambda_importance: float | None = None
    """Weight of the importance term; 0 turns it off. By default 1 for sst2, 0.01 for imdb, 0.1 for synthetic."""
    lambda_interaction: float | None = None
    """Weight of the interaction term; 0 turns it off. By default 0.1 for sst2, 0.01 for imdb, 0.1 for synthetic."""
    variant: Variant = "released"
    """Form of both terms: the released code's means, to which the paper's λ belong, or the paper's sums."""
    impl: _Impl = "auto"
    """Back end of both terms; see safr-fast env."""
    learning_rate: float = 1e-4
    """Of Adam."""
    batch_size: int = 32
    """Texts in a batch; texts of similar length go together."""
    batch_tokens: int | None = None
    """Instead of --batch-size: tokens in a batch, at most, of pads too where they count. Each text of an epoch
    then weighs the same."""
    accumulate: int = 1
    """Batches that each process adds up for one step, as if they were one."""
    epochs: int | None = None
    """At most; by default 100, for synthetic 15."""
    patience: int = 3
    """Stop after this many epochs without a better development accuracy."""
    seed: int = 0
    """Of initial weights, batches, dropout and gates."""
    device: str = "auto"
    """auto: the GPU if there is one."""
    threads: int | None = None
    """CPU threads; PyTorch's own choice by default."""
    bf16: bool = False
    """Matrix products and both terms in bfloat16, by autocast; weights stay in float32."""
    compile: bool = False
    """Training steps through torch.compile."""
    checkpoint_every: int = 200
    """Steps between two checkpoints, at which --resume goes on; the end of an epoch is one too."""
    log_every: int = 50
    """Steps between two records in metrics.jsonl."""
    log_gradients: bool = False
    """Record with them the norm of each term's gradient, at the cost of a backward pass for each: of the means over the
    last batch that the first process takes in that step. Not with --compile."""
    out: Path | None = None
    """Run folder; runs/<dataset>-<time> by default."""
    model: ModelConfig = field(default_factory=ModelConfig)

    def __post_init__(self) -> None:
        as_paths(self, "data_dir", "out")
        check_choice("dataset", self.dataset, Dataset)
        check_choice("protocol", self.protocol, ProtocolName)
        check_choice("variant", self.variant, Variant)
        check_choice("impl", self.impl, _Impl)
        self.model.check()
        for name in (
            "batch_size",
            "batch_tokens",
            "accumulate",
            "epochs",
            "patience",
            "log_every",
            "threads",
            "checkpoint_every",
        ):
            _at_least(self, name, 1)
        for name in ("seed", "data_seed", "max_len"):
            _at_least(self, name, 0)
        if self.full_length and self.max_len:
            raise OptionError(f"full_length cuts no text, but max_len is {self.max_len}: give one of the two")
        if self.protocol == "released" and (self.full_length or self.max_len == 0):
            given = "full_length" if self.full_length else "max_len 0"
            raise OptionError(
                f"{given} cuts no text, but the protocol released pads every text to one length: "
                "give max_len of at least 1, or the protocol masked"
            )
        if self.log_gradients and self.compile:
            raise OptionError("log_gradients goes back several times, as a compiled step cannot: give one of the two")
        for name in ("lambda_importance", "lambda_interaction"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise OptionError(f"{name} must be finite and at least 0, got {value!r}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise OptionError(f"learning_rate must be finite and above 0, got {self.learning_rate!r}")

    def resolved(self) -> "TrainConfig":
        """The same with the data set's own values for what was left open.

        Raises:
            OptionError: an option that would do nothing beside another.
        """
        if self.batch_size != TrainConfig.batch_size and (self.batch_tokens or self.full_length):
            given = "batch_tokens" if self.batch_tokens else "full_length"
            raise OptionError(f"batch_size counts texts, but {given} makes batches by tokens: give one of the two")
        if self.all_rows and self.dataset != "sst2":
            raise OptionError(f"all_rows is for sst2, got it for {self.dataset}: leave it out")
        values = _OWN[self.dataset] | (_FULL_LENGTH if self.full_length else {})
        if self.protocol == "released":
            values["max_len"] = _RELEASED_LENGTH[self.dataset]
        own = {name: value for name, value in values.items() if getattr(self, name) is None}
        return dataclasses.replace(self, **own)

    def to_json(self) -> dict[str, Any]:
        """Plain values, as stored in a run's ``config.json``."""
        values = dataclasses.asdict(self)
        return values | {name: str(values[name]) for name in ("data_dir", "out") if values[name] is not None}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "TrainConfig":
        return cls(**(values | {"model": ModelConfig(**values["model"])}))


def as_paths(config: object, *names: str) -> None:
    """Makes paths of strings, in a frozen dataclass that is being made."""
    for name in names:
        if isinstance(value := getattr(config, name), str):
            object.__setattr__(config, name, Path(value))


def check_choice(name: str, value: object, choices: Any) -> None:
    """``choices``: a ``Literal``."""
    allowed = get_args(choices)
    if value not in allowed:
        raise OptionError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _at_least(config: object, name: str, least: int) -> None:
    value = getattr(config, name)
    if value is not None and value < least:
        raise OptionError(f"{name} must be at least {least}, got {value!r}")
