"""The language model's loss without its logits: the ordinary loss and gradients, whatever is trained and however."""

import sys
from types import ModuleType

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig

from llama_smop.models import lm_loss
from llama_smop.models.lm_loss import linear_cross_entropy, target_positions
from llama_smop.models.tiny import build_tiny
from llama_smop.models.units import IGNORED_LABEL
from tests.models.conftest import WORDS, chosen, clip
from tests.rounding import TINY_MODEL, assert_same_gradients, assert_same_sums
from tests.training import children

CLIPS = [clip(20, 1), clip(25, 2), clip(22, 3)]
ONE_LOSS = 60  # additions: at most 20 of a logit, 20 of a softmax and 20 labels
TEXTS = ["bin blue", "set red at by f now please", "lay"]


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    """Fewer rows in a chunk than a clip has labels."""
    monkeypatch.setattr(lm_loss, "CHUNK", 3)


def problem(dtype=torch.float64, rows=11, width=6, vocabulary=17):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def ordinary(x, weight, targets):
    return cross_entropy((x @ weight.T).float(), targets, reduction="sum")


@pytest.mark.parametrize("chunk", (1, 4, 11, 100))
def test_it_is_the_ordinary_loss_whatever_the_chunk(chunk):
    x, weight, targets = problem()
    expected = cross_entropy(x @ weight.T, targets, reduction="sum")
    found = linear_cross_entropy(x, weight, targets, chunk=chunk)
    assert_same_sums(found, expected, ONE_LOSS, "the loss")
    upstream = torch.tensor(0.3, dtype=torch.float64)
    expected, found = (torch.autograd.grad(loss, (x, weight), upstream) for loss in (expected, found))
    for ours, want, what in zip(found, expected, ("rows", "weight"), strict=True):
        assert_same_sums(ours, want, ONE_LOSS, f"the gradient of the {what}")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("autocast", (False, True), ids=("", "autocast"))
def test_no_further_from_float64_than_the_ordinary_loss(dtype, autocast):
    x, weight, targets = problem(dtype, rows=40, width=32, vocabulary=300)
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    exact = [
        value := cross_entropy(exact[0] @ exact[1].T, targets, reduction="sum"),
        *torch.autograd.grad(value, exact),
    ]

    def errors(compute):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = compute(x, weight, targets)
        found = [value, *torch.autograd.grad(value, (x, weight))]
        assert value.dtype == torch.float32 and all(g.dtype == dtype for g in found[1:])
        return [((f.double() - e).norm() / e.norm()).item() for f, e in zip(found, exact, strict=True)]

    plain, ours = errors(ordinary), errors(lambda *a: linear_cross_entropy(*a, chunk=7))
    for name, mine, theirs in zip(("loss", "rows' gradient", "weight's gradient"), ours, plain, strict=True):
        assert mine <= 1.2 * theirs + 1e-6, f"{name}: {mine:.1e} against {theirs:.1e}"


def test_what_is_frozen_costs_nothing_and_nothing_is_made_without_grad():
    x, weight, targets = problem(torch.float32)
    made = {}
    for trained in (True, False):
        weight.requires_grad_(trained)
        with LargestOf(weight.shape) as made[trained]:
            linear_cross_entropy(x, weight, targets, chunk=1).backward()
    assert made[False].count == 0 < made[True].count, "a gradient was made for a frozen head"
    with torch.no_grad():
        assert not linear_cross_entropy(x, weight, targets).requires_grad


def test_a_second_backward_is_refused():
    x, weight, targets = problem()
    loss = linear_cross_entropy(x, weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class LargestOf(TorchDispatchMode):
    """Counts the operators that make a tensor of a shape's size or more."""

    def __init__(self, shape):
        super().__init__()
        self.size, self.count = torch.Size(shape).numel(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and not func.is_view and made.numel() >= self.size:
            self.count += 1
        return made


def small(speech=False, **changes):
    """A model and a batch, by itself of text with the markers' own embeddings; `changes` of the config."""
    torch.manual_seed(0)
    settings = {"width": 16, "audio_layers": 1, "video_layers": 1, "text_layers": 1, "max_seconds": 1.0}
    model, processor = build_tiny(WORDS, **settings)
    if changes:
        text = model.config.text_config.to_dict() | changes.pop("text_config", {})
        config = type(model.config)(**model.config.to_dict() | {"text_config": text} | changes)
        model = type(model)(config)
    batch = processor(text=TEXTS, **chosen(CLIPS, "audiovisual"))
    text = ("input_ids", "attention_mask", "labels")
    return model.train(), batch if speech else {k: batch[k] for k in text}


def step(model, batch, **arguments):
    model.zero_grad()
    output = model(**batch, **arguments)
    output.loss.backward()
    return output, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("changes", "arguments", "checkpointing"),
    (
        ({"speech": True}, {}, False),
        ({}, {}, True),
        ({"text_config": {"tie_word_embeddings": False}}, {"num_items_in_batch": 5}, False),
        ({"lora": {"language_model": {"r": 4, "alpha": 8}}}, {"num_items_in_batch": torch.tensor(5)}, True),
    ),
    ids=("tied", "tied checkpointed", "untied", "frozen checkpointed"),
)
def test_a_training_step_is_the_ordinary_one(changes, arguments, checkpointing):
    model, batch = small(**changes)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ordinary, expected = step(model, batch, skip_logits=False, **arguments)
    output, gradients = step(model, batch, **arguments)
    assert output.logits is None and ordinary.logits is not None
    assert_same_sums(output.lm_loss, ordinary.lm_loss, ONE_LOSS, "the loss")
    assert_same_gradients(gradients, expected, TINY_MODEL)


def test_positions_given_are_those_found(monkeypatch):
    model, batch = small()
    positions = target_positions(batch["labels"])
    assert len(positions) == (batch["labels"] != IGNORED_LABEL).sum()
    expected = step(model, batch)[0].loss
    monkeypatch.setattr(lm_loss, "target_positions", None)
    assert torch.equal(step(model, batch, target_positions=positions)[0].loss, expected)


def test_left_padding_and_a_label_at_the_very_first_place():
    labels = torch.tensor([[-100, -100, 4, 5], [7, -100, 2, -100]])
    assert target_positions(labels).tolist() == [1, 2, 5], "what no position predicts has no loss"


def test_logits_are_there_when_they_are_wanted():
    model, batch = small()
    assert model(**batch, skip_logits=False).logits is not None
    assert model(**{k: v for k, v in batch.items() if k != "labels"}).logits is not None
    assert model.eval()(**batch).logits is not None
    assert model(**batch, skip_logits=True).logits is None
    model.train().fused_loss = "plain"
    assert model(**batch).logits is not None
    for arguments, message in (({}, "plain"), ({"labels": None}, "needs labels")):
        with pytest.raises(ValueError, match=message):
            model(**dict(batch) | arguments, skip_logits=True)


def test_the_language_models_own_loss_arguments_are_obeyed():
    """Those that only its own loss function knows bring the logits back."""
    model, batch = small()
    shifted = torch.nn.functional.pad(batch["labels"], (0, 1), value=IGNORED_LABEL)[:, 1:]
    shifted = torch.where(shifted == batch["labels"].max(), IGNORED_LABEL, shifted)
    output = model(**batch, shift_labels=shifted)
    expected = cross_entropy(output.logits.flatten(0, 1), shifted.flatten())
    assert_same_sums(output.lm_loss, expected, ONE_LOSS, "the loss")


def test_without_any_label_it_is_what_the_ordinary_loss_is():
    model, batch = small()
    batch["labels"].fill_(IGNORED_LABEL)
    assert model(**batch).lm_loss.isnan() and model(**batch, skip_logits=False).lm_loss.isnan()


def language_model(config):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return AutoModelForCausalLM.from_config(config(vocab_size=20, num_key_value_heads=2, head_dim=8, **sizes))


def test_a_head_that_is_not_known_keeps_the_ordinary_loss():
    assert lm_loss.resolve("auto", language_model(LlamaConfig)) == "chunked"
    gemma = language_model(GemmaConfig)
    assert lm_loss.resolve("auto", gemma) == "plain"
    with pytest.raises(ValueError, match=r'"chunked" knows the heads of llama.*is a gemma'):
        lm_loss.resolve("chunked", gemma)


def test_a_choice_that_cannot_run_says_why(monkeypatch):
    with pytest.raises(ValueError, match="one of auto, chunked, liger, plain, got 'fast'"):
        lm_loss.check_fused_loss("fast", torch.device("cpu"))
    with pytest.raises(ValueError, match='needs a CUDA device, got cpu; use "chunked"'):
        lm_loss.check_fused_loss("liger", torch.device("cpu"))
    monkeypatch.setattr(lm_loss, "is_liger_kernel_available", lambda: False)
    with pytest.raises(ValueError, match="pip install liger-kernel"):
        lm_loss.check_fused_loss("liger", torch.device("cuda"))
    monkeypatch.setattr(lm_loss, "is_liger_kernel_available", lambda: True)
    lm_loss.check_fused_loss("liger", torch.device("cuda"))


def test_liger_is_called_as_it_documents(monkeypatch):
    """A stand-in with the constructor's and the call's argument names of liger-kernel 0.8."""

    class LigerFusedLinearCrossEntropyLoss(torch.nn.Module):
        def __init__(self, ce_weight=None, ignore_index=-100, lse_square_scale=0.0, label_smoothing=0.0,
                     reduction="mean", softcap=None, return_z_loss=False):  # fmt: skip
            super().__init__()
            assert ce_weight is None and softcap is None and not (lse_square_scale or label_smoothing or return_z_loss)
            self.ignore_index, self.reduction = ignore_index, reduction

        def forward(self, lin_weight, _input, target, bias=None):
            assert lin_weight.dim() == _input.dim() == 2 and target.dtype == torch.int64
            logits = torch.nn.functional.linear(_input, lin_weight, bias)
            return cross_entropy(logits, target, ignore_index=self.ignore_index, reduction=self.reduction)

    package, transformers = ModuleType("liger_kernel"), ModuleType("liger_kernel.transformers")
    transformers.LigerFusedLinearCrossEntropyLoss = LigerFusedLinearCrossEntropyLoss
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", transformers)
    monkeypatch.setattr(lm_loss, "check_fused_loss", lambda kind, device: None)
    model, batch = small()
    expected, gradients = step(model, batch)
    model.fused_loss = "liger"
    output, found = step(model, batch)
    assert_same_sums(output.loss, expected.loss, ONE_LOSS, "the loss")
    assert_same_gradients(found, gradients, TINY_MODEL)


def test_under_torch_compile_the_number_of_labels_may_change():
    x, weight, targets = problem(torch.float32, rows=30)
    compiled = torch.compile(lambda x, w, t: linear_cross_entropy(x * 2, w, t) * 2, backend="eager")
    for rows in (3, 17, 30):
        expected = 2 * ordinary(x[:rows] * 2, weight, targets[:rows])
        assert_same_sums(compiled(x[:rows], weight, targets[:rows]), expected, ONE_LOSS, "the loss")


def sharded_step(folder) -> None:
    """On each of two processes: gradients of the same batch with the layers and the rest sharded, gathered."""
    torch.distributed.init_process_group("gloo")
    model, batch = small()
    for layer in model.language_model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    output, _ = step(model, batch)
    assert output.logits is None
    gradients = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}
    if torch.distributed.get_rank() == 0:
        torch.save(gradients, folder / "gradients.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.xdist_group("ranks")
def test_sharded_by_fsdp2_it_gives_the_same_gradients(tmp_path):
    children.ranks(sharded_step, 2, tmp_path)
    expected = step(*small())[1]
    found = torch.load(tmp_path / "gradients.pt", weights_only=True)
    assert_same_gradients(found, expected, TINY_MODEL)


@pytest.mark.parametrize("offload", (cpu_offload, disk_offload))
def test_an_offloaded_head_is_called_for_its_logits(tmp_path, offload):
    model, batch = small()
    expected = model(**batch, skip_logits=False).lm_loss
    where = (tmp_path,) if offload is disk_offload else ()
    offload(model, *where, execution_device=torch.device("cpu"))
    for _ in range(3):
        output = model(**batch)
        torch.testing.assert_close(output.lm_loss, expected)
        assert output.logits is not None
    with pytest.raises(ValueError, match="skip_logits needs a head without hooks, which offloading adds"):
        model(**batch, skip_logits=True)


def test_a_head_with_a_hook_is_called():
    model, batch = small()
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda module, given, made: seen.append(made))
    model(**batch)
    assert len(seen) == 1
