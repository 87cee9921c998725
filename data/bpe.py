"""How files of byte-level BPE write bytes, for CLIP's tokenizer and those of language models."""


def byte_alphabet():
    """Returns character -> byte for the characters that encode bytes in BPE files, in GPT-2's order."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


LETTERS = byte_alphabet()
