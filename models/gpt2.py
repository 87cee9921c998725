"""How GPT-2 is read from Hugging Face's files: its tensors get the names of models/gpt.py."""
import json

NAMES = {"wte.": "embed_tokens.", "wpe.": "embed_positions.", "ln_f.": "norm.", "h.": "layers.",
         "ln_1.": "input_layernorm.", "ln_2.": "post_attention_layernorm.", "mlp.c_fc.": "mlp.up_proj.",
         "mlp.c_proj.": "mlp.down_proj.", "attn.c_proj.": "self_attn.o_proj."}


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


def tokenizer_text(vocab, merges):
    """Returns a tokenizer.json made of the files vocab.json and merges.txt."""
    lines = merges.read_text("utf-8").splitlines()
    pairs = [line for line in lines if line and not line.startswith("#version")]
    model = dict(vocab=json.loads(vocab.read_text("utf-8")), merges=pairs)
    return json.dumps(dict(model=model, pre_tokenizer=dict(type="ByteLevel")))
