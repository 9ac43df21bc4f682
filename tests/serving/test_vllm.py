"""vLLM's CPU engine with the plug-in: the answers are those of vLLM alone, and of `patch`.

Needs an environment with vLLM (`constraints-vllm.txt`): `pytest -m vllm`. Engines run in this
process, so that tests can change the size of chunks on one that has started.
"""

import gc
import importlib.util
from dataclasses import dataclass

import pytest
import torch
from transformers import AutoModelForCausalLM

import sparse_patch
from tests.serving.tiny import FAMILIES, WINDOW, prompts, save

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("ignore"),  # vLLM's own
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM"),
]

DENSE = {"method": "dense", "min_length": 64, "min_queries": 8}
SPARSE = {"method": "strided:gamma=0.6,block_size=16,stride=4", "min_length": 64}
# Of all lengths: below and above windows, above a block of the cache, below `min_length`.
PROMPTS = prompts(300, 120, 83, 20)
CASES = [(name, "float32") for name in FAMILIES]
CASES += [("llama", "bfloat16"), ("gemma2", "bfloat16")]
ROUNDING = {"float32": 2e-5, "bfloat16": 0.04}


@pytest.fixture(scope="module", autouse=True)
def _in_this_process():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        yield


@dataclass
class Answer:
    """Tokens of an answer, and log-probabilities of the prompt's tokens (without a cached beginning
    only) and of the answer's."""

    tokens: list
    of_prompt: torch.Tensor
    of_answer: torch.Tensor
    cached: int


class Engine:
    """An engine; `settings` None: without sparse_patch."""

    def __init__(self, model, settings=None, dtype="float32", eager=True):
        from vllm import LLM

        extra = {} if settings is None else {"sparse_patch": settings}
        self.llm = LLM(
            model,
            dtype=dtype,
            enforce_eager=eager,
            max_model_len=512,
            block_size=32,
            skip_tokenizer_init=True,
            additional_config=extra,
            distributed_executor_backend="uni",
        )

    def answers(self, asked, chunk=2048, prompt_logprobs=True, tokens=6):
        """What the model says to each, together in batches of at most `chunk` tokens."""
        from vllm import SamplingParams

        self.llm.llm_engine.engine_core.engine_core.scheduler.max_num_scheduled_tokens = chunk
        sampling = SamplingParams(
            temperature=0,
            max_tokens=tokens,
            logprobs=0,
            prompt_logprobs=0 if prompt_logprobs else None,
            detokenize=False,
            ignore_eos=True,
        )
        return [self._answer(out) for out in self.llm.generate(asked, sampling, use_tqdm=False)]

    @staticmethod
    def _answer(out):
        found = out.outputs[0]
        of_answer = [
            of[token].logprob for of, token in zip(found.logprobs, found.token_ids, strict=True)
        ]
        of_prompt = []
        if out.prompt_logprobs is not None:  # the first of which is nothing
            given = zip(out.prompt_logprobs, out.prompt_token_ids, strict=True)
            of_prompt = [of[token].logprob for of, token in given if of is not None]
        return Answer(
            list(found.token_ids),
            torch.tensor(of_prompt),
            torch.tensor(of_answer),
            out.num_cached_tokens,
        )

    def reset(self):
        self.llm.reset_prefix_cache()

    def report(self):
        (found,) = sparse_patch.serving.report(self.llm)
        return found

    def close(self):
        del self.llm
        gc.collect()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = {}

    def of(family):
        if family not in made:
            made[family] = save(family, tmp_path_factory.mktemp(family))
        return made[family]

    return of


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def pair(request, folder):
    """The engine alone, and with the method that keeps everything."""
    family, dtype = request.param
    engines = Engine(folder(family), dtype=dtype), Engine(folder(family), DENSE, dtype=dtype)
    yield family, ROUNDING[dtype], *engines
    for engine in engines:
        engine.close()


def assert_same(got, want, rounding):
    for mine, theirs in zip(got, want, strict=True):
        pairs = zip(mine.tokens, theirs.tokens, strict=True)
        upto = next((i for i, (a, b) in enumerate(pairs) if a != b), len(theirs.tokens))
        assert rounding > 1e-3 or mine.tokens == theirs.tokens
        torch.testing.assert_close(mine.of_prompt, theirs.of_prompt, atol=rounding, rtol=0)
        a, b = mine.of_answer[:upto], theirs.of_answer[:upto]
        torch.testing.assert_close(a, b, atol=rounding, rtol=0)


@pytest.mark.parametrize("chunk", [2048, 96, 50])
def test_dense_says_what_vllm_says(pair, chunk):
    """Whole prompts in one batch; chunks of them beside decode steps and other prompts."""
    _, rounding, plain, dense = pair
    before = dense.report()
    for engine in (plain, dense):
        engine.reset()
    assert_same(dense.answers(PROMPTS, chunk), plain.answers(PROMPTS, chunk), rounding)
    after = dense.report()
    assert after.sparse_calls > before.sparse_calls
    assert after.density == 1
    assert {"decode", "short"} <= set(after.exact)


def test_dense_says_what_vllm_says_where_the_beginning_is_cached(pair):
    _, rounding, plain, dense = pair
    first, other = prompts(200, 90)
    longer = {"prompt_token_ids": first["prompt_token_ids"] + other["prompt_token_ids"]}
    said = []
    for engine in (plain, dense):
        engine.reset()
        engine.answers([first], prompt_logprobs=False)
        said.append(engine.answers([longer, other], prompt_logprobs=False))
        assert said[-1][0].cached >= 160
    assert_same(said[1], said[0], rounding)


def test_windows_that_hide_keys_are_left_to_vllm(pair):
    family, _, _, dense = pair
    sliding = {"mistral_swa", "gemma2", "gemma3", "gpt_oss"}
    dense.reset()
    before = dense.report()
    dense.answers(prompts(WINDOW - 10, WINDOW + 50), tokens=1)
    after = dense.report()
    hidden = after.exact.get("sliding window", 0) - before.exact.get("sliding window", 0)
    layers = {"mistral_swa": 4}.get(family, 2) if family in sliding else 0
    assert hidden == layers
    assert after.sparse_calls - before.sparse_calls == 8 - layers


@pytest.fixture(scope="module")
def sparse(folder):
    engine = Engine(folder("llama"), SPARSE)
    yield engine
    engine.close()


def test_a_sparse_method_says_what_it_says_in_transformers(sparse, folder):
    """Prompts in one chunk: the same plans, and log-probabilities but for rounding."""
    model = AutoModelForCausalLM.from_pretrained(folder("llama"), dtype=torch.float32)
    method = sparse_patch.get_method(SPARSE["method"])
    asked = prompts(400, 250)
    sparse.reset()
    before = sparse.report()
    got = sparse.answers(asked, tokens=1)
    after = sparse.report()
    with sparse_patch.patch(model, method, min_length=64) as handle:
        for one, answer in zip(asked, got, strict=True):
            ids = torch.tensor([one["prompt_token_ids"]])
            with torch.no_grad():
                logits = model(ids).logits[0].float().log_softmax(-1)
            want = logits[:-1].gather(1, ids[0, 1:, None])[:, 0]
            torch.testing.assert_close(answer.of_prompt, want, atol=2e-4, rtol=0)
            assert answer.tokens == [int(logits[-1].argmax())]
        there = handle.report()
    assert after.sparse_calls - before.sparse_calls == there.sparse_calls == 8
    assert after.density == pytest.approx(there.density, abs=1e-3)
    assert after.density < 0.9


def test_an_answer_does_not_depend_on_what_else_is_in_the_batch(sparse):
    sparse.reset()
    together = sparse.answers(PROMPTS)
    for one, answer in zip(PROMPTS, together, strict=True):
        sparse.reset()
        assert_same(sparse.answers([one]), [answer], 1e-4)


def test_a_compiled_model_says_the_same(sparse, folder):
    sparse.reset()
    want = sparse.answers(PROMPTS)
    compiled = Engine(folder("llama"), SPARSE, eager=False)
    assert_same(compiled.answers(PROMPTS), want, 1e-4)
    assert compiled.report().density < 0.9
    compiled.close()


# --- what is refused, before anything is loaded ---------------------------------------------------


def configuration(model, settings, **options):
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(
        model, additional_config=settings, skip_tokenizer_init=True, max_model_len=256, **options
    ).create_engine_config()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "stridet"}, "did you mean 'strided'"),
        ({"method": "strided:sride=8"}, "strided has no parameter 'sride'"),
        ({"method": "dense", "minlength": 8}, "does not know minlength"),
        ({"method": "dense", "layers": [9]}, "no attention layer"),
        ({"method": "dense", "min_length": "auto"}, "must be a number of tokens"),
    ],
)
def test_what_does_not_exist_is_named_before_anything_is_loaded(folder, settings, message):
    with pytest.raises(ValueError, match=message):
        configuration(folder("llama"), {"sparse_patch": settings})


def test_models_that_select_or_compress_keys_are_refused(tmp_path):
    from tests.zoo import tiny_model

    tiny_model("deepseek_v3").save_pretrained(tmp_path)
    configuration(str(tmp_path), {})
    with pytest.raises(ValueError, match="keeps its keys compressed"):
        configuration(str(tmp_path), {"sparse_patch": DENSE})


def test_versions_that_were_not_tested_are_refused(folder, monkeypatch):
    monkeypatch.setattr("vllm.__version__", "0.99.1")
    configuration(folder("llama"), {})
    with pytest.raises(ValueError, match=r"tested with vLLM 0\.32, and this is 0\.99\.1"):
        configuration(folder("llama"), {"sparse_patch": DENSE})


def test_nothing_happens_unless_it_is_asked_for(folder):
    from vllm.config import set_current_vllm_config
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    from sparse_patch.serving.vllm_cpu import SparseCPUBackend, SparseCPUImpl

    config = configuration(folder("llama"), {})
    assert "sparse_patch" not in config.additional_config
    assert not config.parallel_config.worker_extension_cls
    with set_current_vllm_config(config):
        assert SparseCPUBackend.get_impl_cls() is CPUAttentionBackendImpl
    with set_current_vllm_config(configuration(folder("llama"), {"sparse_patch": DENSE})):
        assert SparseCPUBackend.get_impl_cls() is SparseCPUImpl


def test_the_environment_may_name_the_method(folder, monkeypatch):
    monkeypatch.setenv("SPARSE_PATCH_METHOD", "strided:preset=fine")
    settings = configuration(folder("llama"), {}).additional_config["sparse_patch"]
    assert settings["method"] == "strided:preset=fine"
    monkeypatch.setenv("SPARSE_PATCH_METHOD", "strided:preset=fin")
    with pytest.raises(ValueError, match="did you mean 'fine'"):
        configuration(folder("llama"), {})


# --- packings -------------------------------------------------------------------------------------


PACKINGS = [(isa, dtype) for isa in ("vec", "vec16") for dtype in (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize(("isa", "dtype"), [*PACKINGS, ("amx", torch.bfloat16)])
def test_the_packings_of_all_cpus_are_found(isa, dtype):
    """Writing needs no matrix units, attention does."""
    from vllm import _custom_ops as ops

    from sparse_patch.serving.pages import Pages, find_packing
    from sparse_patch.serving.vllm_cpu import _writer

    block, dim, heads, length = 64, 64, 3, 150
    unpack = find_packing(_writer(isa, block, dim, dtype), block, dim, dtype)
    assert unpack is not None
    keys, values = torch.randn(2, length, heads, dim).to(dtype)
    cache = torch.zeros(5, heads, block, 2 * dim, dtype=dtype)
    halves = cache.view(5, heads, 2 * block, dim).chunk(2, dim=2)
    table = torch.tensor([[4, 0, 2]])
    slots = torch.cat([place * block + torch.arange(block) for place in table[0]])[:length]
    ops.cpu_attn_reshape_and_cache(keys, values, *halves, slots, isa)
    got = Pages(cache, unpack, table).read(0, length)
    assert torch.equal(got[0], keys.transpose(0, 1))
    assert torch.equal(got[1], values.transpose(0, 1))
