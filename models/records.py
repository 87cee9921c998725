"""What eval.py writes besides its table: every answer (--answers), and what a report comes from (--json)."""


def label(row):
    """Returns the name of a row of the table."""
    return row.method if row.beta is None else f"{row.method}, beta {row.beta:g}"


def texts(examples, written, tokenizer):
    """Yields prompt, reference answer, and answers of each example; written: label -> answers (ids)."""
    for i, (name, parts) in enumerate(examples):
        answers = {row: tokenizer.decode(ids[i], first=False) for row, ids in written.items()}
        yield dict(example=name, prompt="".join(text for text, _ in parts[:-1]), reference=parts[-1][0],
                   answers=answers)


def predictions(data, log_probs, top=5):
    """Yields class and most likely classes of each image; data: Images. log_probs: label -> [N, L]."""
    best = {row: [x.tolist() for x in scores.exp().topk(min(top, scores.shape[-1]))]
            for row, scores in log_probs.items()}
    for i, k in enumerate(data.labels.tolist()):
        answers = {row: {data.classes[j]: round(p, 4) for p, j in zip(probabilities[i], classes[i])}
                   for row, (probabilities, classes) in best.items()}
        yield dict(image=i, reference=data.classes[k], answers=answers)


def accuracy_by_class(data, scores):
    """Returns class name -> accuracy of scores [N, L], for the classes that have images."""
    right = (scores.argmax(-1) == data.labels).float()
    return {name: right[data.labels == k].mean().item() for k, name in enumerate(data.classes)
            if (data.labels == k).any()}
