"""Writes the fixtures of tests/fixtures that transformers computes: families, a tokenizer, and chats.

pip install transformers jinja2
python tests/measure/fixtures.py

Families are small random models in the public layout, with transformers' logits and greedy text. The
tokenizer has SmolLM2's steps; beside it are the ids of 260 strings, of it and of the other tokenizers. The
chats are 20 conversations in the form of four chat templates, which are written here in the style of each
family, with transformers' ids.
"""
import gzip
import json
import random
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import decoders, pre_tokenizers, trainers

OUT = Path(__file__).parents[1] / "fixtures"
SIZES = dict(vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=1, max_position_embeddings=64, torch_dtype="bfloat16", bos_token_id=0,
             eos_token_id=1, pad_token_id=None)
THETA = dict(rope_type="default", rope_theta=5e5)
# What is odd in each family: a head width that is not width / heads (Qwen3, Mistral), untied matrices
# (OLMo 2, Mistral), layers without RoPE (SmolLM3), a window (Mistral).
FAMILIES = dict(
    qwen3=dict(SIZES, head_dim=24, tie_word_embeddings=True, rms_norm_eps=1e-6, rope_parameters=THETA),
    olmo2=dict(SIZES, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
               rms_norm_eps=1e-6, rope_parameters=THETA),
    smollm3=dict(SIZES, num_hidden_layers=4, tie_word_embeddings=True, no_rope_layers=[1, 0, 1, 1],
                 rope_parameters=dict(rope_type="default", rope_theta=2e6)),
    mistral=dict(SIZES, head_dim=24, tie_word_embeddings=False, sliding_window=32, rope_parameters=THETA))
# In the style of Qwen (a system message that is there anyway), Llama 3 (the date, spaces cut off), Mistral
# (spaces around what is said, an error if turns do not alternate), and OLMo 2 (roles, and one end token).
CHATML = r"""
{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\nBe brief.<|im_end|>\n' }}
{%- endif %}
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
HEADERS = r"""
{{- bos_token }}
{%- for m in messages %}
    {{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}
    {%- if m['role'] == 'system' %}
        {{- 'Digits of the year: ' + strftime_now('%Y') | length | string + '\n' }}
    {%- endif %}
    {{- m['content'] | trim }}{{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
INST = r"""
{{- bos_token }}
{%- set first = 1 if messages[0]['role'] == 'system' else 0 %}
{%- for m in messages[first:] %}
    {%- set system = messages[0]['content'] + '\n\n' if first and loop.first else '' %}
    {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('user and assistant must take turns') }}
    {%- endif %}
    {%- if m['role'] == 'user' %}
        {{- '[INST] ' + system + m['content'] + ' [/INST]' }}
    {%- else %}
        {%- generation %}{{- ' ' + m['content'] + eos_token }}{%- endgeneration %}
    {%- endif %}
{%- endfor %}
"""
ROLES = r"""
{{- bos_token }}
{%- for m in messages %}
    {{- '<|' + m['role'] + '|>\n' + m['content'] }}
    {%- if m['role'] == 'assistant' %}{{- eos_token }}{%- endif %}
    {%- if not loop.last %}{{- '\n' }}{%- endif %}
    {%- if loop.last and add_generation_prompt %}{{- '\n<|assistant|>\n' }}{%- endif %}
{%- endfor %}
"""
# Name -> tokenizer's fixture, template, special tokens, and the names of some in tokenizer_config.json.
CHATS = dict(
    chatml=("qwen2_tokenizer", CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            dict(eos_token="<|im_end|>")),
    headers=("llama3_tokenizer", HEADERS, ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>",
                                           "<|start_header_id|>", "<|end_header_id|>"],
             dict(bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")),
    inst=("llama2_tokenizer", INST, ["<s>", "</s>"], dict(bos_token="<s>", eos_token="</s>")),
    roles=("smollm2_tokenizer", ROLES, ["<|endoftext|>"],
           dict(bos_token="<|endoftext|>", eos_token="<|endoftext|>")))
WORDS = [  # also of digits that are not 0 to 9, spaces of other widths, and marks that join
    "It's", "3.14159", "isn't", "naïve", "café", "123456", "日本語", "🎉👩\u200d👩\u200d👧", "x**2",
    "# comment", "$1,234.56", "DON'T!", "\u00bd", "\u00b2", "\u2460", "\u2167", "\u0663\u0664", "hello",
    "world", "'ll", "a", "B", "\u2019s", "…", "<|im_end|> ", "_", "\t", "\n", "\r\n", " ", "  ", "\u00a0",
    "\u3000", "0", "9", "x" * 30, "e\u0301", "ﬁ", "!?", "word"]


def family(name, sizes):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():  # of a norm as well, which begins at 1
            p.add_(0.2 * torch.randn(p.shape, generator=generator).to(p.dtype))
    model.save_pretrained(OUT / name)
    (OUT / name / "generation_config.json").unlink()
    ids = torch.randint(2, sizes["vocab_size"], (2, 24), generator=generator)
    ids[1, 3] = 0  # padding for generate, as in the other fixtures
    model = model.float()
    with torch.no_grad():
        greedy = model.generate(ids[:, :8], max_new_tokens=24, do_sample=False, eos_token_id=None,
                                pad_token_id=0)
        io = dict(ids=ids, logits=model(ids).logits, prompt=ids[:, :8], greedy=greedy)
    torch.save(io, OUT / name / "io.pt")


def tokenizer():
    rows = gzip.decompress((OUT.parents[1] / "data/gsm8k-train.jsonl.gz").read_bytes()).splitlines()[:1000]
    corpus = [json.loads(row)["question"] for row in rows]
    t = tokenizers.Tokenizer(tokenizers.models.BPE())
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                               pre_tokenizers.ByteLevel(add_prefix_space=False)])
    t.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    t.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet,
                                                      special_tokens=["<|endoftext|>"], show_progress=False))
    folder = OUT / "smollm2_tokenizer"
    folder.mkdir(exist_ok=True)
    t.save(str(folder / "tokenizer.json"))
    draw, cases = random.Random(0), []
    for _ in range(260):
        text = "".join(draw.choice(["", " "]) + draw.choice(WORDS) for _ in range(draw.randint(1, 8)))
        cases.append(dict(text=text, ids=t.encode(text, add_special_tokens=False).ids))
    lines = ",\n".join(json.dumps(x, ensure_ascii=False, separators=(",", ":")) for x in cases)
    (folder / "expected.json").write_text(f"[\n{lines}\n]\n")
    texts, others = [x["text"] for x in cases if "<|" not in x["text"]], {}  # special in some of the others
    for name in ("qwen2_tokenizer", "llama3_tokenizer", "llama2_tokenizer"):
        t = tokenizers.Tokenizer.from_file(str(OUT / name / "tokenizer.json"))
        others[name] = [t.encode(text, add_special_tokens=False).ids for text in texts]
    (folder / "others.json").write_text(json.dumps(others, separators=(",", ":")).replace("]],", "]],\n"))


def conversations():
    draw, result = random.Random(0), []
    for i in range(20):
        say = lambda: " ".join(draw.choice(WORDS[:20]) for _ in range(draw.randint(1, 6)))  # noqa: E731
        messages = [dict(role="system", content=say())] if i % 3 == 0 else []
        for _ in range(draw.randint(1, 3)):
            messages += [dict(role="user", content=say()), dict(role="assistant", content=say())]
        result.append(messages)
    return result


def chats():
    folder, talks, cases = OUT / "chats", conversations(), {}
    folder.mkdir(exist_ok=True)
    for name, (source, template, special, names) in CHATS.items():
        t = tokenizers.Tokenizer.from_file(str(OUT / source / "tokenizer.json"))
        t.add_special_tokens([tokenizers.AddedToken(x, special=True, normalized=False) for x in special])
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=t, chat_template=template, **names)
        cases[name] = dict(template=template, special=special, names=names, tokenizer=source, ids=[
            dict(whole=fast.apply_chat_template(x, return_dict=False),
                 prompt=fast.apply_chat_template(x[:-1], add_generation_prompt=True, return_dict=False))
            for x in talks])
    text = json.dumps(dict(conversations=talks, families=cases), ensure_ascii=False, separators=(",", ":"))
    (folder / "expected.json").write_text(text.replace('},{"whole"', '},\n{"whole"') + "\n")


if __name__ == "__main__":
    for name, sizes in FAMILIES.items():
        family(name, sizes)
    tokenizer()
    chats()
    print("transformers", transformers.__version__, "tokenizers", tokenizers.__version__)
