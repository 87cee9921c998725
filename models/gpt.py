"""GPT-2, and Llama with its relatives (Qwen, SmolLM, OLMo 2, Mistral, Falcon3), in one decoder.

Parameters have the names of Llama's public checkpoints, without their "model." prefix. An architecture is a
dict of plain values, which `architecture` makes of a config.json:

    vocab, width, layers, heads, kv_heads, head_width, mlp (inner width), positions (at most), eps, tied (the
    output matrix is the embedding), end (id after every response in training), rope (theta and llama3, the
    scaling, or None for learned positions), layer_norm (False: RMSNorm), gated_mlp, qkv_bias, bias (of o_proj
    and the MLP)

and, if it is unlike Llama's:

    ends (all ids that end an answer), norms ("after": of the outputs of attention and MLP, not of their
    inputs), qk_norm (of queries and keys: "head", each head on its own, or "full", all heads together),
    rope_layers (for each layer, whether it has RoPE)
"""
import contextlib
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from data import files, hub, schema
from data.tokenizer import Tokenizer

HEAD_STD = 0.3  # of the logits of a new output matrix, for features of size 1


def frequencies(rope, width):
    """Returns RoPE's radians per position, float32 [head width / 2]; llama3 lowers the small ones."""
    f = rope["theta"] ** -(torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width)
    if scaling := rope.get("llama3"):
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * f / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1 if many turns fit into the original context
        f = f * (keep + (1 - keep) / scaling["factor"])
    return f


def rotate(x, cos, sin):
    """Applies RoPE to x [B, H, T, D/H]: rotates pairs (a, b), a from the first half of x, b from the second.

    (a, b) becomes (a cos - b sin, b cos + a sin). cos, sin [T, D/H] or [B, 1, T, D/H] hold each value twice,
    the first negated in sin: a roll and one fused multiply-add are faster on a CPU than separate halves. They
    have the dtype of x.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class Attention(nn.Module):
    """Causal self-attention with a KV cache; G = heads / kv_heads heads share their keys and values.

    has_rope: whether queries and keys are rotated.
    """

    def __init__(self, arch, has_rope):
        super().__init__()
        self.heads, self.kv_heads = arch["heads"], arch["kv_heads"]
        inner, kv = (n * arch["head_width"] for n in (self.heads, self.kv_heads))
        self.q_proj = nn.Linear(arch["width"], inner, bias=arch["qkv_bias"])
        self.k_proj = nn.Linear(arch["width"], kv, bias=arch["qkv_bias"])
        self.v_proj = nn.Linear(arch["width"], kv, bias=arch["qkv_bias"])
        self.o_proj = nn.Linear(inner, arch["width"], bias=arch["bias"])
        self.has_rope, self.qk_norm = has_rope, arch.get("qk_norm")
        if self.qk_norm:
            sizes = (inner, kv) if self.qk_norm == "full" else [arch["head_width"]] * 2
            self.q_norm, self.k_norm = (nn.RMSNorm(size, eps=arch["eps"]) for size in sizes)

    def forward(self, x, rope, past):
        """Maps x [B, T, D] to [B, T, D]; rope: as `GPT.embed` returns it. past: a cache.Past, or None."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)  # [B, T, D], and twice [B, T, KV * D/H]
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q = q.unflatten(-1, (self.heads, -1))  # [B, T, D] -> [B, T, H, D/H]
        k, v = (y.unflatten(-1, (self.kv_heads, -1)) for y in (k, v))  # [B, T, KV, D/H]
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        # Autocast computes norms in float32.
        q, k, v = (y.type_as(v).transpose(1, 2) for y in (q, k, v))  # [B, H, T, D/H], [B, KV, T, D/H]
        if rope is not None and self.has_rope:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if past is not None:
            k, v = past.extend(k, v)  # [B, KV, keys, D/H]
        if x.shape[1] > 1 and (past is None or past.mask is None):
            if q.is_cuda and q.dtype == torch.float32:  # no fused kernel for float32 takes shared keys
                k, v = (y.repeat_interleave(self.heads // self.kv_heads, 1) for y in (k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] < self.heads)
        else:
            # No fused kernel takes both a mask and shared keys: the G heads that share keys become one head
            # with G*T queries.
            q = q.unflatten(1, (self.kv_heads, -1)).flatten(2, 3)  # [B, H, T, D/H] -> [B, KV, G*T, D/H]
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=past and past.mask)
            y = y.unflatten(2, (-1, x.shape[1])).flatten(1, 2)  # [B, KV, G*T, D/H] -> [B, H, T, D/H]
        return self.o_proj(y.transpose(1, 2).flatten(2))  # [B, H, T, D/H] -> [B, T, D]


class MLP(nn.Module):
    """GPT-2's MLP with GELU, or the gated one of Llama."""

    def __init__(self, arch):
        super().__init__()
        width, inner, bias = arch["width"], arch["mlp"], arch["bias"]
        self.gate_proj = nn.Linear(width, inner, bias=bias) if arch["gated_mlp"] else None
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x):
        if self.gate_proj is None:
            return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def norm(arch, place=None):
    """Returns a new normalization layer, or no layer if the architecture has none in a block's `place`."""
    if place not in (None, arch.get("norms") or "before"):
        return nn.Identity()
    return (nn.LayerNorm if arch["layer_norm"] else nn.RMSNorm)(arch["width"], eps=arch["eps"])


class Block(nn.Module):
    """Attention and MLP, each added to its input, with a normalization layer before or after it."""

    def __init__(self, arch, has_rope):
        super().__init__()
        self.input_layernorm, self.self_attn = norm(arch, "before"), Attention(arch, has_rope)
        self.post_attention_layernorm, self.mlp = norm(arch, "before"), MLP(arch)  # Llama's name: before MLP
        self.attention_output_norm, self.mlp_output_norm = norm(arch, "after"), norm(arch, "after")

    def forward(self, x, rope, past):
        x = x + self.attention_output_norm(self.self_attn(self.input_layernorm(x), rope, past))
        return x + self.mlp_output_norm(self.mlp(self.post_attention_layernorm(x)))


class GPT(nn.Module):
    """A decoder-only language model, for prt.fit and prt.generate."""

    def __init__(self, arch):
        super().__init__()
        self.arch, width = arch, arch["width"]
        self.size = arch["vocab"]  # number of logits; smaller if the output matrix has rows without a token
        self.register_buffer("reads", None, persistent=False)  # see models/vocabulary.py
        self.recompute = False  # activation checkpointing: only the blocks' inputs are kept for backward
        self.embed_tokens = nn.Embedding(arch["vocab"], width)
        self.embed_positions = None if arch["rope"] else nn.Embedding(arch["positions"], width)
        has_rope = arch.get("rope_layers") or [True] * arch["layers"]
        self.layers = nn.ModuleList(Block(arch, x) for x in has_rope)
        self.norm = norm(arch)
        self.lm_head = None if arch["tied"] else nn.Linear(width, arch["vocab"], bias=False)
        rope = frequencies(arch["rope"], arch["head_width"]) if arch["rope"] else None
        self.register_buffer("rope", rope, persistent=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:  # as in GPT-2, matrices that write to the residual stream are scaled by depth
                depth = 2 * arch["layers"] if "o_proj" in name or "down_proj" in name else 1
                nn.init.normal_(p, std=0.02 if "embed" in name else (depth * p.shape[1]) ** -0.5)

    def cache(self, batch, length, pad=None):
        """Returns an empty cache for `length` positions. Raises ValueError if the model has fewer."""
        from models.cache import Cache, check_room
        check_room(length, self.arch["positions"])
        weight = self.embed_tokens.weight
        return Cache(self.arch, batch, length, weight.device, weight.dtype, pad)

    def features(self, ids, cache=None, at=None):
        """Returns features [B, T, D], the input of `head`, for token ids [B, T] that follow the cached ones.

        at: for compiled steps, as in `Cache.place`. Raises ValueError if the tokens exceed the cache or,
        without one, the model's positions.
        """
        T = ids.shape[1]
        if cache is not None:
            positions, pasts = cache.place(T, at, ids.device)
        else:
            if self.arch["positions"] < T:
                raise ValueError(f"{T} tokens, but this model has room for {self.arch['positions']}")
            positions, pasts = torch.arange(T, device=ids.device), [None] * len(self.layers)
        x, rope = self.embed(ids, positions)
        for layer, past in zip(self.layers, pasts):
            inputs = x, rope, past
            options = dict(use_reentrant=False, preserve_rng_state=False)  # nothing in a layer is random
            x = checkpoint(layer, *inputs, **options) if self.recompute else layer(*inputs)
        return self.norm(x)

    def embed(self, ids, positions):
        """Returns the embeddings [B, T, D] of ids [B, T] at positions [T] or [B, T], and RoPE's tables.

        These are the cosines and sines of the angles, each [T, D/H] or [B, 1, T, D/H], or None without RoPE.
        """
        x = self.embed_tokens(ids if self.reads is None else self.reads[ids])
        if self.embed_positions is not None:
            return x + self.embed_positions(positions), None
        angles = positions[..., None] * self.rope.float()  # [T, D/2H] or [B, T, D/2H]
        if positions.ndim == 2:
            angles = angles.unsqueeze(1)  # [B, 1, T, D/2H]: the same for all heads
        device = x.device.type  # of the queries and keys, which autocast computes in its dtype
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)  # once for all layers
        return x, (torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1))

    def head(self, features):
        """Maps features [..., D] to logits [..., size] of the first `size` tokens of the vocabulary."""
        tied = self.lm_head is None
        logits = F.linear(features, self.embed_tokens.weight) if tied else self.lm_head(features)
        if self.reads is not None:
            from models import vocabulary  # an optional file
            return vocabulary.translated(logits, self.reads)
        return logits[..., :self.size]  # of all: autocast caches casts of whole weights

    def forward(self, ids, index=None):
        """Maps token ids [B, T] to logits [B, T, V], or to features [N, D] if index is given.

        index [N]: the positions in ids.flatten() to return features of. In training, prt.fit calls `head` for
        a chunk of them at a time.
        """
        device, in_bfloat16 = ids.device.type, self.norm.weight.dtype == torch.bfloat16
        # Weights in bfloat16 need no autocast, which would compute norms in float32: 9 more kernels a layer.
        with torch.autocast(device, enabled=torch.is_autocast_enabled(device) and not in_bfloat16):
            x = self.features(ids)
            return self.head(x) if index is None else x.flatten(0, 1)[index]


def new_output_matrix(model, seed):
    """Gives a GPT a random output matrix, in place, whose logits have a standard deviation of about HEAD_STD.

    A copied one would carry the source's answers into the reward. A tied model is untied: its embedding stays
    as it is.
    """
    rows, width = model.arch["vocab"], model.arch["width"]
    if model.lm_head is None:
        print(f"the reward's output matrix is not tied to its embedding: {rows * width:,} more weights")
    random = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    model.lm_head = nn.Linear(width, rows, bias=False, device="meta")
    model.lm_head.weight = nn.Parameter(HEAD_STD * width**-0.5 * random)
    model.arch["tied"] = False


def network(info, arch, head=None):
    """Returns a GPT with random weights; the arguments are those of models/clip.py's function."""
    return GPT(arch)


# Public files

# Family -> the tables of data/schemas.toml that tell, with "config", what its config.json may say.
TABLES = dict(gpt2=["gpt2"], llama=["llama"], qwen2=["llama", "qwen2"], qwen3=["llama", "qwen3"],
              olmo2=["llama"], smollm3=["llama", "smollm3"], mistral=["llama", "mistral"])
# Family -> what is in its architecture and not in Llama's.
UNLIKE_LLAMA = dict(qwen2=dict(qkv_bias=True), qwen3=dict(qk_norm="head"),
                    olmo2=dict(qk_norm="full", norms="after"))
# Family -> keys that its config.json may leave out, with the values that transformers takes then.
DEFAULTS = dict(smollm3=dict(tie_word_embeddings=True, no_rope_layer_interval=4),
                mistral=dict(sliding_window=4096))
# Names in files with norms "after" -> in this file. In Llama's files, the first one is that of another norm.
AFTER = dict(post_attention_layernorm="attention_output_norm", post_feedforward_layernorm="mlp_output_norm")
WEIGHTS = "model.safetensors", "model.safetensors.index.json"
# Keys of generation_config.json that would change what greedy decoding writes -> the values without effect.
GREEDY = dict(repetition_penalty=1.0, no_repeat_ngram_size=0, min_length=0, guidance_scale=1, num_beams=1) | \
    dict.fromkeys(("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id",
                   "forced_eos_token_id", "min_new_tokens", "sequence_bias", "stop_strings",
                   "exponential_decay_length_penalty", "penalty_alpha"))


def check_arch(arch):
    """Raises ValueError unless an architecture in a checkpoint has the keys and values named above."""
    schema.check(arch, "arch", "gpt")
    if arch["heads"] % arch["kv_heads"] or (arch["rope"] and arch["head_width"] % 2):
        raise ValueError(f"{arch['heads']} heads of width {arch['head_width']}, {arch['kv_heads']} of keys")
    if len(layers := arch.get("rope_layers") or [True] * arch["layers"]) != arch["layers"]:
        raise ValueError(f"{len(layers)} layers are said to have RoPE or not, but there are {arch['layers']}")
    if max(end_ids(arch), default=0) >= arch["vocab"]:
        raise ValueError(f"an end token is {max(end_ids(arch))}, but there are {arch['vocab']} tokens")


def end_ids(arch):
    """Returns the list of the ids that end an answer, with the one that ends those of training first."""
    return [i for i in dict.fromkeys([arch["end"], *(arch.get("ends") or ())]) if i is not None]


def read_folder(name, dtype):
    """Returns the architecture and tensors of a GPT in Hugging Face's layout; name: a folder or Hub id.

    dtype: that of the tensors, or None for that of the files.
    """
    generation = hub.optional(name, "generation_config.json", *WEIGHTS)
    generation = files.read_json(generation) if generation else {}
    arch, tensors = architecture(files.read_json(hub.find(name, "config.json")), generation), {}
    check_arch(arch)
    index = hub.find(name, *WEIGHTS)
    shards = {index.name}
    if index.suffix == ".json":
        shards = set(files.read_json(index)["weight_map"].values())
    for shard in sorted(shards):  # one at a time
        if Path(shard).name != shard or Path(shard).suffix != ".safetensors":
            raise ValueError(f"{index.name} names {shard}, which is not a .safetensors file in its folder")
        content = renamed(files.read(hub.find(name, shard)), arch)
        if twice := content.keys() & tensors.keys():
            raise ValueError(f"{shard}: {min(twice)} is in another file, too")
        tensors |= {k: x.to(dtype or x.dtype) for k, x in content.items()}
    if arch["tied"] and (head := tensors.get("lm_head.weight")) is not None:
        arch["tied"] = head.equal(tensors["embed_tokens.weight"])  # if not, it counts, as in transformers
        if arch["tied"]:
            del tensors["lm_head.weight"]
    if others := [f"{k} {generation[k]}" for k, x in GREEDY.items() if generation.get(k) not in (x, None)]:
        print(f"not applied of generation_config.json: {', '.join(others):.300}")
    return arch, tensors


def architecture(config, generation=None):
    """Returns the arch dict of a Hugging Face config.json. Raises ValueError if it says what is not read.

    generation: the content of generation_config.json, whose end tokens count as well.
    """
    family = config.get("model_type")
    if family not in TABLES:
        raise ValueError(f"config.json: model_type {family!r:.50}; models/gpt.py supports {', '.join(TABLES)}"
                         " (Falcon3 and SmolLM2 are llamas)")
    schema.check(config, "config.json", "config", *TABLES[family])
    config = DEFAULTS.get(family, {}) | config
    schema.check(generation or {}, "generation_config.json", "generation")
    ends = [end for x in (config, generation or {}) for end in listed(x.get("eos_token_id"))]
    arch = dict(vocab=config["vocab_size"], end=ends[0] if ends else None)
    if len(set(ends)) > 1:
        arch["ends"] = [*dict.fromkeys(ends)]
    if family == "gpt2":
        from models import gpt2  # an optional file
        return arch | gpt2.architecture(config)
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    positions, window = config["max_position_embeddings"], family == "mistral" and config["sliding_window"]
    if window and window < positions:
        print(f"only {window} of {positions} positions can be used: longer texts need a sliding window")
        positions = window
    if family == "smollm3":
        every = config["no_rope_layer_interval"]
        has_rope = config.get("no_rope_layers") or [(i + 1) % every for i in range(layers)]
        arch["rope_layers"] = [bool(x) for x in has_rope[:layers]]
    return arch | dict(width=config["hidden_size"], layers=layers, heads=heads,
                       kv_heads=config.get("num_key_value_heads") or heads,
                       head_width=config.get("head_dim") or config["hidden_size"] // heads,
                       mlp=config["intermediate_size"], positions=positions,
                       eps=config["rms_norm_eps"], tied=bool(config.get("tie_word_embeddings")),
                       rope=rope_parameters(config), layer_norm=False, gated_mlp=True, qkv_bias=False,
                       bias=False) | UNLIKE_LLAMA.get(family, {})


def rope_parameters(config):
    """Returns `rope` of the arch dict, from rope_parameters or the older keys rope_theta and rope_scaling."""
    new, old = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    if config.get("rope_theta") is not None:
        old = dict(rope_theta=config["rope_theta"]) | old
    if new and any(new.get(k) != x for k, x in old.items()):
        raise ValueError(f"config.json: rope_parameters {new} and rope_theta or rope_scaling {old} disagree")
    parameters = dict(rope_theta=2e6 if config["model_type"] == "smollm3" else 1e4) | old | new
    kinds = {parameters.get("rope_type"), parameters.get("type")} - {None}
    if len(kinds) > 1:
        raise ValueError(f"config.json: RoPE has the types {' and '.join(map(str, kinds))}")
    kinds -= {"default"}
    schema.check(parameters, "config.json: RoPE", "rope", *kinds & {"llama3"})
    scaling = {k: parameters[k] for k in schema.SCHEMAS["llama3"]} if kinds else None
    return dict(theta=parameters["rope_theta"], llama3=scaling)


def listed(value):
    """Returns a list as it is, and of another value a list with it, or an empty list for None."""
    return value if isinstance(value, list) else [] if value is None else [value]


def renamed(tensors, arch):
    """Returns a Hugging Face GPT's tensors with the names of this file, without copies and old buffers."""
    if arch["rope"] is None:
        from models import gpt2  # an optional file
        tensors = gpt2.renamed(tensors)
    names = AFTER if arch.get("norms") == "after" else {}
    return {".".join(names.get(part, part) for part in name.removeprefix("model.").split(".")): x
            for name, x in tensors.items() if ".inv_freq" not in name}


def tokenizer_text(name):
    """Returns the text of a folder's tokenizer.json, or one made of GPT-2's files, or ""."""
    config, others, _ = (hub.optional(name, file, "tokenizer.json") for file in (
        "tokenizer_config.json", "added_tokens.json", "chat_template.jinja"))  # the last is for data/chat.py
    config, others = (files.read_json(file) if file else {} for file in (config, others))
    with contextlib.suppress(FileNotFoundError):
        file = hub.find(name, "tokenizer.json", "vocab.json")
        if file.name == "vocab.json":
            from models import gpt2
            return gpt2.tokenizer_text(name, config, others)
        text = files.read_text(file)
        if config or others:
            check_tokenizer_config(config, others, text)
        return text
    return ""


def check_tokenizer_config(config, others, text):
    """Raises ValueError if the files beside a tokenizer.json change its ids.

    config: that of tokenizer_config.json. others: that of added_tokens.json. text: that of tokenizer.json.
    """
    tokenizer = files.parse_json(text)
    plain = [bool(tokenizer["model"].get("byte_fallback"))]
    read = {"add_prefix_space?": plain, "added_tokens_decoder?": "a dict", "(ignored)": ["*"]}
    schema.check(config, "tokenizer_config.json", read)
    vocab = tokenizer["model"]["vocab"] | {t["content"]: t["id"] for t in tokenizer.get("added_tokens") or ()}
    if wrong := [t for t, i in others.items() if vocab.get(t) != i]:
        raise ValueError(f"added_tokens.json: {wrong[0]!r} is not in the tokenizer with this id")
    flags = ("content", "lstrip", "rstrip", "single_word", "normalized", "special")
    ours, theirs = ({str(i): {k: t.get(k, False) for k in flags} for i, t in tokens} for tokens in (
        [(t["id"], t) for t in tokenizer.get("added_tokens") or ()],
        (config.get("added_tokens_decoder") or {}).items()))
    if theirs and theirs != ours:
        differ = sorted(i for i in ours | theirs if ours.get(i) != theirs.get(i))
        raise ValueError(f"tokenizer_config.json: its added_tokens_decoder and tokenizer.json's added_tokens "
                         f"differ: {differ[0]} {theirs.get(differ[0])}")


def same_vocabulary(models, base=None):
    """Returns the tokenizer that GPTs share, and limits their logits to its number of tokens.

    models: name -> GPT. base: the name of one whose tokenizer may have other special and added tokens than
    the rest, which models/vocabulary.py adapts to it then. Raises ValueError if the tokenizers differ, or an
    output matrix has too few rows. A reward in a small file has only the hash of its tokenizer, whose text
    may be larger than the rest.
    """
    tokenizers = {name: Tokenizer(model.info.get("tokenizer"), name) for name, model in models.items()
                  if not model.info.keys() & {"ticket", "lora"}}
    first_name = base or next(iter(tokenizers))
    first, known = tokenizers[first_name], {tokenizer.hash: tokenizer for tokenizer in tokenizers.values()}
    for name, model in models.items():
        other = tokenizers[name].hash if name in tokenizers else model.info["tokenizer"]
        if other == first.hash:
            continue
        if base and other in known and known[other].ordinary == first.ordinary:
            from models import vocabulary  # an optional file
            vocabulary.adapt(model, known[other], models[base], first, name)
        else:
            hint = "" if name in tokenizers else "; its file has only a hash: is --source there?"
            raise ValueError(f"{first_name} has {first.size} tokens ({first.hash[:8]}), {name} has others "
                             f"({other!s:.8}): a reward and its base must have the same tokenizer{hint}")
    size, rows = first.size, {name: model.size for name, model in models.items()}
    if min(rows.values()) < size:
        raise ValueError(f"the tokenizer has {size} tokens, more than an output matrix has rows: {rows}")
    if set(rows.values()) != {size}:
        print(f"output matrices with {rows} rows are cut to the tokenizer's {size}")
        for model in models.values():
            model.size = size
    return first
