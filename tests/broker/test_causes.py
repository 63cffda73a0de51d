import pytest

from luacell.broker.causes import UNKNOWN, Cause


@pytest.mark.parametrize(
    ("cause", "text", "label"),
    [
        (Cause(signal=11), "signal 11 (SIGSEGV)", "SIGSEGV"),
        (Cause(signal=35), "signal 35 (SIG35)", "SIG35"),
        (Cause(exit_code=0), "exit code 0", "exit 0"),
        (Cause(exit_code=7), "exit code 7", "exit 7"),
        (Cause(problem="no memory"), "no memory", "start failed"),
        (UNKNOWN, "an unknown cause", "unknown"),
    ],
)
def test_a_cause_says_how_the_worker_ended(cause: Cause, text: str, label: str) -> None:
    assert (str(cause), cause.label) == (text, label)
