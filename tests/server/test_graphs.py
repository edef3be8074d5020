"""A few of the workflows with mistakes of `dev.py bench graphs`: none ends in a bare error or harms the next."""

from attune.benchmark import graphs


def test_no_mistake_ends_in_a_bare_error_or_harms_what_comes_after(server):
    found = list(graphs.check(server, 10, seed=1))
    assert not [(what, outcome) for _, what, outcome in found if outcome.kind in (*graphs.BAD, graphs.SLOW)]
    assert {graphs.RAN, graphs.CLEAR} <= {outcome.kind for *_, outcome in found}


def test_what_would_be_wrong_is_counted():
    """The mistakes are of every kind, and a bare error, a long one and a stock node's are told from a sentence."""
    error = {"node_type": "AttunePromptSwap", "exception_type": "ValueError", "traceback": []}
    for said, changes, kind in (
        ("The steps are 5; lower them.\n", {}, graphs.CLEAR),
        ("Execution Blocked: Connect one.", {"exception_type": "ExecutionBlocked"}, graphs.CLEAR),
        ("math domain error", {}, graphs.BARE),
        ("a " * 1000 + ".", {}, graphs.BARE),
        ("No such thing.", {"exception_type": "TypeError"}, graphs.BARE),
        ("mat1 and mat2", {"node_type": "KSampler", "traceback": ['  File "/x/comfy/ops.py"\n']}, graphs.STOCK),
        ("mat1 and mat2", {"node_type": "KSampler", "traceback": ['  File "/custom_nodes/attune/x"\n']}, graphs.BARE),
    ):
        assert graphs._told({**error, **changes, "exception_message": said}).kind == kind, said
