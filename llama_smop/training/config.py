"""The schema of a training file (YAML). Unknown keys are errors; defaults follow the published recipe."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from llama_smop.models.rates import MOST, rate_text
from llama_smop.training.compose import compose

Modality = Literal["audio", "video", "audiovisual"]
AtLeastOne = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Snr = Annotated[float, Field(ge=-100, le=100)]  # decibels


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ProjectorSection(Section):
    """The projector between the towers and the language model."""

    kind: Literal["smop", "dense"] = "smop"
    sharing: Literal["JEJR", "JEDR", "DEDR"] = "DEDR"
    num_experts: int = Field(4, ge=1)
    top_k: int = Field(2, ge=1)
    hidden_features: int = Field(2048, ge=1)
    backend: Literal["auto", "torch", "triton", "cuda"] = "auto"
    # Activations that backward computes again instead of keeping them; or how many bytes of them may be kept.
    recompute: Literal["none", "h", "z", "hz"] | Annotated[int, Field(ge=0)] = "none"
    activation: Literal["relu", "gelu", "silu"] = "relu"
    layer_norm: bool = True
    # The forms of other papers and codes: docs/operators.md. A dense projector has none of them.
    shared_experts: int = Field(0, ge=0)
    input_norm: Literal["rms", "layer"] | None = None
    gated: bool = False
    normalize_weights: bool = True
    weight_scale: float = Field(1.0, gt=0)
    router: Literal["linear", "mlp"] = "linear"
    router_hidden: int = Field(512, ge=1)
    router_bias: bool = False
    router_jitter: float = Field(0.0, ge=0, lt=1)
    balance: Literal["switch", "mse"] | None = "switch"
    merge: Literal["utterance"] | None = None


class TinySection(Section):
    """A model from scratch, small enough for two CPU cores; its vocabulary is the words of the training labels."""

    width: int = Field(128, ge=16, le=4096, multiple_of=16)  # AV-HuBERT's positional convolution has 16 groups
    audio_layers: int = Field(2, ge=1, le=100)
    video_layers: int = Field(2, ge=1, le=100)
    video_stride: int = Field(4, ge=1, le=16)  # of the first convolution on the lips; below 8 a pool follows
    video_activation: Literal["prelu", "relu"] = "prelu"  # of the ResNet on the lips; relu is quicker
    video_channels: int = Field(8, ge=4, le=1024, multiple_of=4)  # four groups of a norm
    text_layers: int = Field(3, ge=1, le=100)
    max_seconds: float = Field(3.0, ge=0.1, le=30)  # the longest clip; Whisper's window is 30 s
    ctc_weight: float = Field(1.5, ge=0)


class ModelSection(Section):
    """A `tiny` model from scratch, or pretrained parts, each a hub name or a folder."""

    tiny: TinySection | None = None
    language_model: str | None = None
    audio_tower: str | None = None
    video_tower: str | None = None
    lora: str | dict | None = None
    modalities: tuple[Literal["audio", "video"], ...] = ("audio", "video")
    rate_audio: int = Field(4, ge=1)
    rate_video: int = Field(2, ge=1)
    # Several rates (audio, video) of one model, of which training draws one for each batch; the first is the default.
    rates: tuple[tuple[AtLeastOne, AtLeastOne], ...] | None = Field(None, min_length=1, max_length=MOST)
    rate_projectors: Literal["shared", "separate"] = "shared"
    compression: Literal["pool", "stack"] = "pool"
    projector: ProjectorSection = ProjectorSection()
    load_balancing_coef: float = Field(0.01, ge=0)  # weights of the auxiliary losses in the training loss
    router_z_coef: float = Field(0.001, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _first_rate(cls, given):
        match given:
            case {"rates": [[audio, video], *_]}:
                return {"rate_audio": audio, "rate_video": video} | given
        return given

    @model_validator(mode="after")
    def _rates_agree(self):
        if self.rates is not None and self.rates[0] != (self.rate_audio, self.rate_video):
            raise ValueError(
                f"rates begin with {rate_text(self.rates[0])}, which is the default, and rate_audio and rate_video are "
                f"{self.rate_audio} and {self.rate_video}: leave those out"
            )
        if self.rates is not None and len(set(self.rates)) < len(self.rates):
            raise ValueError("rates must differ from each other")
        shared = self.rates is not None and len(self.rates) > 1 and self.rate_projectors == "shared"
        if shared and self.compression == "stack":
            raise ValueError(
                "compression stack makes tokens wider at a higher rate, so rates have no projector in common: set "
                "rate_projectors separate, or compression pool"
            )
        return self

    @model_validator(mode="after")
    def _one_origin(self):
        if (self.tiny is None) == (self.language_model is None):
            raise ValueError("give either tiny (from scratch) or language_model with its towers")
        if self.tiny is not None:
            named = [name for name in ("audio_tower", "video_tower", "lora") if getattr(self, name) is not None]
            if named:
                raise ValueError(f"{', '.join(named)}: not with tiny, which is trained from scratch")
        return self

    def common(self) -> dict:
        """The fields of `LlamaSmopConfig` that a tiny model and one of pretrained parts both take."""
        names = ("modalities", "rate_audio", "rate_video", "rates", "rate_projectors", "compression")
        return {name: getattr(self, name) for name in (*names, "load_balancing_coef", "router_z_coef")}


class NoiseSection(Section):
    """Noise in training audio. `source` is "babble" (other clips of the corpus) or a wav file."""

    source: str = "babble"
    snrs: tuple[Snr | None, ...] = (-5, 0, 5, 10, 15, 20, None)


class StageSection(Section):
    """A stage of the curriculum, which ends at share `until` of the steps; modalities have relative frequencies."""

    until: Fraction = 1.0
    modalities: dict[Modality, Annotated[float, Field(gt=0)]] = {"audiovisual": 1.0}
    noise: bool = True


class DataSection(Section):
    """Clips in the LRS3 layout (`root`, `train`), or shards that `llama-smop corpus shard` wrote (`shards`)."""

    root: Path | None = None
    train: str = "train.csv"  # under root; shards have their own labels
    shards: str | None = None  # a folder, https://…, or "pipe:COMMAND {name}", as webdataset opens them
    window: int = Field(512, ge=1)  # clips among which a data worker makes batches of shards; it holds twice that many
    stages: tuple[StageSection, ...] = (StageSection(),)
    max_frames: int = Field(1500, ge=1)  # video frames (25 a second) in a batch
    max_clips: int | None = Field(None, ge=1)
    buckets: int = Field(400, ge=1)
    noise: NoiseSection | None = NoiseSection()
    time_mask: bool = True
    keep_decoded: bool = False  # cache decoded clips in memory; for small corpora
    workers: int = Field(0, ge=0)
    max_bad_clips: int = Field(10, ge=0)  # unusable clips that are named and replaced; one more ends the run

    @model_validator(mode="after")
    def _one_source(self):
        if (self.root is None) == (self.shards is None):
            raise ValueError("give either root (clips in the LRS3 layout) or shards")
        if self.shards is None:
            if self.window != type(self).model_fields["window"].default:
                raise ValueError("window goes with shards, not with root")
        elif self.keep_decoded:
            raise ValueError("keep_decoded is for small corpora under root, not for shards")
        elif self.shards.startswith("pipe:") and "{name}" not in self.shards:
            raise ValueError(f'the command in shards must hold {{name}}, the file to fetch, got "{self.shards}"')
        return self

    @model_validator(mode="after")
    def _stages_follow(self):
        ends = [stage.until for stage in self.stages]
        if not ends or ends[-1] != 1 or sorted(set(ends)) != ends:
            raise ValueError(f"the stages' until must rise to 1, got {ends}")
        return self


class OptimizerSection(Section):
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    betas: tuple[Fraction, Fraction] = (0.9, 0.98)
    max_grad_norm: float = Field(10.0, gt=0)
    warmup: Fraction = 0.0  # share of the steps
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    steps: int | None = Field(None, ge=1)
    epochs: float | None = Field(None, gt=0)
    accumulate: int = Field(1, ge=1)
    precision: Literal["fp32", "bf16"] = "bf16"
    gradient_checkpointing: bool = False
    global_aux_losses: bool = False  # auxiliary losses over the tokens of all processes, not of each alone
    compile: bool = False  # torch.compile of the projector and of the language model's layers
    fused_loss: Literal["auto", "chunked", "liger", "plain"] = "auto"  # "plain" computes all positions' logits

    @model_validator(mode="after")
    def _one_length(self):
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs")
        return self


class RunSection(Section):
    name: str | None = None  # of the wandb run; default: the folder's name
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    seed: int = 0
    log_every: int = Field(20, ge=1)
    save_every: int = Field(500, ge=1)
    keep: int = Field(2, ge=1)
    average_last: int = Field(1, ge=1)  # the model is the mean of this many last checkpoints
    strategy: Literal["ddp", "fsdp2"] = "ddp"  # for several processes: replicated or sharded
    max_bad_steps: int = Field(10, ge=1)  # skipped steps in a row (loss or gradient not finite) that end the run

    @model_validator(mode="after")
    def _averaged_are_kept(self):
        if self.average_last > self.keep:
            raise ValueError(f"average_last {self.average_last} needs as many checkpoints: raise keep, now {self.keep}")
        return self


class TrainConfig(Section):
    """A training run: `llama-smop train --config FILE.yaml --out DIR`."""

    model: ModelSection
    data: DataSection
    optimizer: OptimizerSection
    run: RunSection = RunSection()


def read_config(
    sources: str | Path | Sequence[str | Path], overrides: Mapping | None = None, settings: Sequence[str] = ()
) -> TrainConfig:
    """A checked TrainConfig from one or more YAML files, by path or shipped name; later ones override earlier.

    overrides: nested keys that replace the files'. settings: "key.path=value" each, as `--set` takes them, last of all.

    Raises:
        ValueError: no such file, not YAML, an unknown key, a value out of range; one line, naming file and key.
    """
    return compose(sources, overrides, settings).check(TrainConfig)
