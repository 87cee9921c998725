"""How GPT-2 is read from Hugging Face's files: its tensors get the names of models/gpt.py."""
import json

from data import files, hub

# Key of the arch dict -> those of config.json, by either name.
KEYS = dict(width=("n_embd", "hidden_size"), layers=("n_layer", "num_hidden_layers"),
            heads=("n_head", "num_attention_heads"), positions=("n_positions", "max_position_embeddings"))
NAMES = {"wte.": "embed_tokens.", "wpe.": "embed_positions.", "ln_f.": "norm.", "h.": "layers.",
         "ln_1.": "input_layernorm.", "ln_2.": "post_attention_layernorm.", "mlp.c_fc.": "mlp.up_proj.",
         "mlp.c_proj.": "mlp.down_proj.", "attn.c_proj.": "self_attn.o_proj."}


def architecture(config):
    """Returns the arch dict of a config.json, as models/gpt.py describes it, but for `vocab` and `end`."""
    sizes = {}
    for ours, names in KEYS.items():
        values = {config[k] for k in names if config.get(k)}
        if len(values) != 1:
            raise ValueError(f"config.json: {' or '.join(names)} must be one number, not {sorted(values)}")
        sizes[ours], = values
    width, heads = sizes["width"], sizes["heads"]
    return sizes | dict(mlp=config.get("n_inner") or 4 * width, kv_heads=heads, head_width=width // heads,
                        eps=config["layer_norm_epsilon"], tied=config.get("tie_word_embeddings") is not False,
                        rope=None, layer_norm=True, gated_mlp=False, qkv_bias=True, bias=True)


def renamed(tensors):
    """Returns GPT-2's tensors with the names and shapes of Llama's; masks in old files are left out."""
    new = {}
    for name, x in tensors.items():
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue
        name = name.removeprefix("transformer.")
        x = x.T.contiguous() if ".c_" in name and x.ndim == 2 else x  # stored as [inputs, outputs]
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        if ".attn.c_attn." in name:  # one matrix for the three projections
            for letter, part in zip("qkv", x.chunk(3)):
                new[name.replace("attn.c_attn", f"self_attn.{letter}_proj")] = part
        else:
            new[name] = x
    return new


def tokenizer_text(name, config, others):
    """Returns a tokenizer.json made of GPT-2's vocab.json and merges.txt; name: a folder or Hub id.

    config: the content of tokenizer_config.json, and others: that of added_tokens.json, or {}.
    Raises ValueError for another family, of which these files do not say how text is split.
    """
    family = files.read_json(hub.find(name, "config.json")).get("model_type")
    if family != "gpt2":
        raise ValueError(f"a {family} without tokenizer.json; vocab.json and merges.txt do not say how text "
                         "is split: save a fast tokenizer (transformers: AutoTokenizer, save_pretrained)")
    vocab, merges = hub.find(name, "vocab.json"), hub.find(name, "merges.txt")
    lines = files.read_text(merges).split("\n")
    pairs = [line.strip("\r") for line in lines if line.strip() and not line.startswith("#version")]
    model = dict(vocab=files.read_json(vocab), merges=pairs)
    tokens = others | {t["content"]: int(i) for i, t in (config.get("added_tokens_decoder") or {}).items()}
    options = [k for k in ("add_prefix_space", "add_bos_token", "add_eos_token") if config.get(k)]
    if wrong := options + [t for t, i in tokens.items() if model["vocab"].get(t) != i]:
        raise ValueError(f"{wrong[0]!r} in tokenizer_config.json or added_tokens.json changes the ids of "
                         "vocab.json and merges.txt: save a fast tokenizer")
    return json.dumps(dict(model=model, pre_tokenizer=dict(type="ByteLevel")))
