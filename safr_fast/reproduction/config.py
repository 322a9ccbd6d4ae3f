"""What a reproduction is told."""

import dataclasses
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from safr_fast.data.sources import Dataset
from safr_fast.evaluation.config import EvaluationConfig
from safr_fast.reproduction.settings import Setting, rows
from safr_fast.training.config import ModelConfig, TrainConfig, Variant, as_paths, check_choice
from safr_fast.training.errors import OptionError

Target = Literal["table1", "table2", "table3", "figure3"]
_Protocols = Literal["masked", "released", "both"]


def _usual(target: Target) -> Literal["released", "both"]:
    return "both" if target == "table1" else "released"


@dataclass(frozen=True)
class ReproductionConfig:
    """Which runs a table or figure is made of."""

    dataset: Dataset = "sst2"
    """sst2 or imdb, from --data-dir or the hub; synthetic needs no data."""
    data_dir: Path | None = None
    """Folder with the data set's files; without it the Hugging Face hub is asked."""
    protocol: _Protocols | None = None
    """The protocol of the runs; by default both for table1, else released, beside which the paper's figures stand."""
    seeds: int = 5
    """Runs of each setting, with seeds 0, 1, ..."""
    rows: tuple[str, ...] = ()
    """Settings, each baseline or two weights such as 1,0.1 (importance, interaction); all of the table by default."""
    out: Path = Path("runs/reproduction")
    """Folder of all runs, and of the results. What is there already is not done again."""
    finished_only: bool = False
    """Train nothing: make the table of those of its runs that are finished in --out."""
    variant: Variant = "released"
    """Form of both terms: the released code's means, to which the paper's weights belong, or the paper's sums."""
    normalised: int = 0
    """Short texts on which AOPC is normalised by a search for its limits, to compare settings by; 0: none."""
    texts: int | None = None
    """Test texts to evaluate on, drawn; all by default."""
    epochs: int | None = None
    """At most; as for safr-fast train by default."""
    patience: int = TrainConfig.patience
    """Stop after this many epochs without a better development accuracy."""
    log_gradients: bool = False
    """Record the norm of each term's gradient in the runs that are trained."""
    device: str = "auto"
    """auto: the GPU if there is one."""
    threads: int | None = None
    """CPU threads; PyTorch's own choice by default."""
    model: ModelConfig = field(default_factory=ModelConfig)

    def __post_init__(self) -> None:
        as_paths(self, "data_dir", "out")
        object.__setattr__(self, "rows", tuple(self.rows))
        check_choice("dataset", self.dataset, Dataset)
        check_choice("variant", self.variant, Variant)
        if self.protocol is not None:
            check_choice("protocol", self.protocol, _Protocols)
        if self.seeds < 1:
            raise OptionError(f"seeds must be at least 1, got {self.seeds!r}")
        if self.normalised < 0:
            raise OptionError(f"normalised must be at least 0, got {self.normalised!r}")
        if not self.model.gate:
            raise OptionError("model.gate belongs to the rows: give --rows baseline for the transformer without VMASK")
        if self.model.layers != 1:
            raise OptionError(f"model.layers must be 1, as in the paper, got {self.model.layers}")
        for row in self.rows:
            Setting.of(row)

    def settings(self, target: Target) -> tuple[Setting, ...]:
        return tuple(dict.fromkeys(map(Setting.of, self.rows))) or rows(target, self.dataset)

    def protocols(self, target: Target) -> tuple[Literal["masked", "released"], ...]:
        protocol = self.protocol or _usual(target)
        return ("masked", "released") if protocol == "both" else (protocol,)

    def departures(self) -> dict[str, Any]:
        """What is trained in another way than the paper's, by option."""
        plain = ReproductionConfig()
        sizes, usual = (dataclasses.asdict(config.model) for config in (self, plain))
        options = {name: getattr(self, name) for name in ("variant", "epochs", "patience")}
        different = {name: value for name, value in options.items() if value != getattr(plain, name)}
        return different | {f"model.{name}": value for name, value in sizes.items() if value != usual[name]}

    def stem(self, target: Target) -> Path:
        """A table's files, without their endings."""
        form = "" if self.variant == "released" else f"-{self.variant}"
        protocol = "" if self.protocol in (None, _usual(target)) else f"-{self.protocol}"
        return self.out / f"{target}-{self.dataset}{form}{protocol}"

    def training(self, protocol: Literal["masked", "released"], setting: Setting, seed: int) -> TrainConfig:
        form = "" if self.variant == "released" else f"-{self.variant}"
        return TrainConfig(
            dataset=self.dataset,
            data_dir=self.data_dir,
            protocol=protocol,
            lambda_importance=setting.importance,
            lambda_interaction=setting.interaction,
            variant=self.variant,
            seed=seed,
            log_gradients=self.log_gradients,
            epochs=self.epochs,
            patience=self.patience,
            device=self.device,
            threads=self.threads,
            out=self.out / f"{self.dataset}-{protocol}-{setting.folder}{form}-seed{seed}",
            model=replace(self.model, gate=setting.gate),
        )

    def evaluation(self, target: Target) -> EvaluationConfig:
        ks: tuple[float, ...] = tuple(range(10, 100, 10)) if target == "figure3" else (30,)
        rankers = ("capacity:ffn1_pre",) if target == "figure3" else ()
        return EvaluationConfig(k=ks, rankers=rankers, sufficiency=False, normalised=self.normalised, texts=self.texts)
