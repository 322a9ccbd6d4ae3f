"""What part the regularisers have in moving the weights, from what a run recorded of its gradients."""

from safr_fast.training.run import RunFolder, write_json

_FILE = "gradients.json"
_TERMS = ("importance", "interaction")


def gradient_shares(folder: RunFolder) -> dict[str, float]:
    """Norm of each weighted term's gradient over the norm of cross-entropy's, of the mean norms of the recorded steps.

    Empty where the run was trained without ``log_gradients``. Kept in a file of its own, so that the metrics, which are
    long, need not be kept with the results.
    """
    stored = folder.load_result(_FILE, remedy="remove it, and it is made anew from the metrics")
    if stored is not None:
        return stored
    steps = [record["train"] for record in folder.load_metrics() if record["event"] == "step"]
    steps = [step for step in steps if "gradient_cross_entropy" in step]
    task = sum(step["gradient_cross_entropy"] for step in steps)
    shares = {
        term: sum(step[f"gradient_{term}_weighted"] for step in steps) / task
        for term in _TERMS
        if steps and f"gradient_{term}_weighted" in steps[0]
    }
    if steps:
        write_json(folder.path / _FILE, shares)
    return shares
