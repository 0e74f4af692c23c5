import dataclasses

import pytest

from minimind.inference.requests import Completion, Request, RequestOutput, RequestTiming, SamplingParams


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1}, {"temperature": float("nan")}, {"temperature": "hot"}, {"temperature": True},
        {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}, {"top_k": 2.5}, {"min_p": -0.1}, {"min_p": 2},
        {"repetition_penalty": 0}, {"presence_penalty": float("inf")}, {"max_new_tokens": 0}, {"n": 0},
        {"seed": -1}, {"seed": 2**63}, {"logprobs": 101}, {"logprobs": -1},
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_one_line_that_names_it(wrong):
    (name, value) = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=rf"^{name}=.*must be [^\n]*$") as error:
        SamplingParams(**wrong)
    assert repr(value) in str(error.value)


def test_stop_strings():
    assert SamplingParams(stop="\n\n").stop == ("\n\n",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    with pytest.raises(ValueError, match="non-empty"):
        SamplingParams(stop=("a", ""))


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().temperature = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        Request([1]).id = "x"


def test_an_output_has_the_properties_of_its_first_completion():
    completions = [Completion(i, f"text {i}", [i, 7, 8], [-1.0, -2.0, -3.0], [], "length") for i in range(2)]
    output = RequestOutput("a", [1, 2], completions, timing=RequestTiming(0.5, 1.0, 3.0))
    assert (output.text, output.token_ids, output.finish_reason) == ("text 0", [0, 7, 8], "length")
    assert output.completion_tokens == 6
    assert output.tokens_per_second == 2.0  # four tokens after the first ones, in two seconds
    refused = RequestOutput("a", [], [], "no")
    assert (refused.text, refused.token_ids, refused.finish_reason) == ("", [], "error")
