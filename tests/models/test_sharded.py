"""Models whose weights are spread over two processes (FSDP2) give the gradients of whole ones."""

import re
from pathlib import Path

from launching import launch

STEP = """
import sys
import torch, torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
sys.path.insert(0, sys.argv[1])
from decoder_families import FAMILIES, VOCAB, make_family
from encoder_decoders import FIRST, make_seq2seq
from scoring_models import make
from etude.data.collate import pack
from etude.data.scored import pack_scored
from etude.models.forward import PolicyForward
from etude.models.score_reader import ScoreReader
from etude.models.scorer import TokenScorer
from etude.models.value_head import AutoModelForCausalLMWithValueHead

BLOCKS = {"LlamaDecoderLayer", "GPT2Block", "T5Block", "BartEncoderLayer", "BartDecoderLayer"}
CHUNK = 4 * 3 * 40  # about three rows of logits: several chunks

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))

def shard(model):
    for module in list(model.modules()):
        if type(module).__name__ in BLOCKS:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)

def decoder(family):
    return make_family(*FAMILIES[family][:2], torch.float64)

def with_adapter():
    lora = LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear")
    return get_peft_model(decoder("llama"), lora).double()

def policy(family):
    return PolicyForward(AutoModelForCausalLMWithValueHead(decoder(family)).double(), CHUNK)

def scorer(model):
    return TokenScorer(model, CHUNK)

def total(model, helper, rows):
    return -helper.total(model, pack(rows, rows), torch.ones_like).total

def scores(model, helper, rows):
    return (helper(model, pack(rows, rows)).logprobs ** 2).sum()

def translated(model, helper, rows):
    batch = pack(rows, rows, sources=[row[::-1] for row in rows])
    return -helper.total(model, batch, torch.ones_like).total

def rewards(model, helper, rows):
    return (helper(model, pack_scored(rows, [[len(row) - 1] for row in rows])) ** 2).sum()

def update(model, helper, rows):
    ids, lengths = torch.tensor([token for row in rows for token in row]), [len(row) for row in rows]
    last = torch.tensor(lengths).cumsum(0) - 1
    states = torch.tensor([i for i in range(len(ids)) if i not in last.tolist()])
    out = model(ids, lengths, states, ids[states + 1], last, entropy_gradient=True)
    return (out.logprobs ** 2).sum() + out.entropies.sum() + (out.values ** 2).sum() + out.last_values.sum()

CASES = {
    "llama": (lambda: decoder("llama"), scorer, total),
    "llama's scores": (lambda: decoder("llama"), scorer, scores),
    "llama as a policy": (lambda: policy("llama"), lambda model: None, update),
    "gpt2": (lambda: decoder("gpt2"), scorer, total),
    "gpt2 as a policy": (lambda: policy("gpt2"), lambda model: None, update),
    "an adapter": (with_adapter, scorer, total),
    "t5": (lambda: make_seq2seq("t5", torch.float64), scorer, translated),
    "bart": (lambda: make_seq2seq("bart", torch.float64), scorer, translated),
    "a reward model": (lambda: make("Llama", "SequenceClassification").double(), ScoreReader, rewards),
}

generator = torch.Generator().manual_seed(3)
rows = [torch.randint(FIRST, 40, (n,), generator=generator).tolist() for n in (9, 14, 5, 11)]
for name, (build, helper, loss) in CASES.items():
    found = []
    for sharded in (False, True):
        torch.manual_seed(0)
        model = build().eval()
        help = helper(model)
        if sharded:
            shard(model)
        value = loss(model, help, rows[rank::2] if sharded else rows)
        value.backward()
        value = value.detach()
        if sharded:
            dist.all_reduce(value)
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append((value, gradients))
    (value, whole), (sharded_value, parts) = found
    assert whole.keys() == parts.keys()
    torch.testing.assert_close(sharded_value, value, rtol=1e-6, atol=0)
    for key, gradient in whole.items():
        torch.testing.assert_close(2 * parts[key].full_tensor(), gradient, rtol=1e-5, atol=1e-5, msg=key)
    assert max(gradient.abs().max() for gradient in whole.values()) > 0.1
    if rank == 0:
        print(f"<{name}>")
dist.destroy_process_group()
"""


def test_sharded_gradients_are_those_of_whole_models(tmp_path):
    """Each process computes half of the rows: what a forward gathers is what scores and values come from."""
    (tmp_path / "step.py").write_text(STEP)
    support = Path(__file__).parents[1] / "support"
    done = launch(2, str(tmp_path / "step.py"), str(support))
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(re.findall("<.+?>", done.stdout)) == 9
    assert "(FSDPPolicyForward) returned a view" not in done.stderr
