"""Asks a server through one client library and prints what it got, as JSON: python clients.py LIBRARY URL

The library's own Python runs this file (test_clients.py names it), so it imports nothing of this project. Every library
answers the same questions: a plain answer, a streamed one with its usage, one to an asynchronous call, a tool call and
the answer after its result, an answer in a given form, and what it says where the server has no embeddings.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from typing import Any

MODEL, KEY = "tiny", "none"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]


def weather(city: str) -> str:
    """Weather in a city"""
    return f"20 degrees in {city}"


def langchain(url: str) -> dict[str, Any]:
    from langchain_core.messages import ToolMessage
    from langchain_openai import ChatOpenAI, OpenAIEmbeddings
    from pydantic import BaseModel, Field

    class Place(BaseModel):
        """A place"""

        city: str = Field(max_length=12)

    model = ChatOpenAI(base_url=url, model=MODEL, api_key=KEY, max_tokens=64, temperature=0, stream_usage=True)
    whole = model.invoke(MESSAGES)
    chunks = list(model.stream(MESSAGES))
    tooled = model.bind_tools([weather])
    question = [("user", "go")]
    call = tooled.invoke(question)
    result = ToolMessage(weather(**call.tool_calls[0]["args"]), tool_call_id=call.tool_calls[0]["id"])
    embeddings = OpenAIEmbeddings(base_url=url, model=MODEL, api_key=KEY, check_embedding_ctx_length=False)
    return {
        "whole": whole.content,
        "streamed": "".join(chunk.content for chunk in chunks),
        "usage": [m["total_tokens"] for chunk in chunks if (m := chunk.usage_metadata)],
        "async": asyncio.run(model.ainvoke(MESSAGES)).content,
        "call": [call.tool_calls[0]["name"], call.tool_calls[0]["args"]],
        "after": "".join(chunk.content for chunk in tooled.stream([*question, call, result])),
        "form": model.with_structured_output(Place, method="json_schema").invoke(MESSAGES).model_dump(),
        "forced": model.with_structured_output(Place, method="function_calling").invoke(MESSAGES).model_dump(),
        "embeddings": refusal(lambda: embeddings.embed_query("hi")),
    }


def llama_index(url: str) -> dict[str, Any]:
    from llama_index.core.llms import ChatMessage
    from llama_index.core.tools import FunctionTool
    from llama_index.llms.openai_like import OpenAILike
    from pydantic import BaseModel, Field

    class Place(BaseModel):
        """A place"""

        city: str = Field(max_length=12)

    model = OpenAILike(
        api_base=url, model=MODEL, api_key=KEY, is_chat_model=True, is_function_calling_model=True,
        should_use_structured_outputs=True, max_tokens=64, temperature=0,
    )  # fmt: skip
    messages = [ChatMessage(role=m["role"], content=m["content"]) for m in MESSAGES]
    chunks = list(model.stream_chat(messages, stream_options={"include_usage": True}))
    tool = FunctionTool.from_defaults(fn=weather)
    answer = model.chat_with_tools([tool], user_msg="go")
    (call,) = model.get_tool_calls_from_response(answer)
    result = ChatMessage(
        role="tool", content=weather(**call.tool_kwargs), additional_kwargs={"tool_call_id": call.tool_id}
    )
    history = [ChatMessage(role="user", content="go"), answer.message, result]
    return {
        "whole": model.chat(messages).message.content,
        "streamed": "".join(chunk.delta or "" for chunk in chunks),
        "usage": [usage.total_tokens for chunk in chunks if (usage := getattr(chunk.raw, "usage", None))],
        "async": asyncio.run(model.achat(messages)).message.content,
        "call": [call.tool_name, call.tool_kwargs],
        "after": [*model.stream_chat_with_tools([tool], chat_history=history)][-1].message.content,
        "form": model.as_structured_llm(Place).chat(messages).raw.model_dump(),
    }


def litellm(url: str) -> dict[str, Any]:
    import litellm as library

    common = {"model": f"openai/{MODEL}", "api_base": url, "api_key": KEY, "max_tokens": 64, "temperature": 0}
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    description = {"name": "weather", "description": "Weather in a city", "parameters": parameters}
    tools = [{"type": "function", "function": description}]
    place = {**parameters, "properties": {"city": {"type": "string", "maxLength": 12}}, "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "Place", "schema": place, "strict": True}}
    cached = [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}]
    messages = [MESSAGES[0], {"role": "user", "content": cached}]
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(library.completion(messages=messages, **usage, **common))
    question = [{"role": "user", "content": "go"}]
    answer = library.completion(messages=question, tools=tools, tool_choice="auto", **common).choices[0].message
    call = answer.tool_calls[0]
    arguments = json.loads(call.function.arguments)
    result = {"role": "tool", "tool_call_id": call.id, "name": "weather", "content": weather(**arguments)}
    history = [*question, answer.model_dump(), result]
    formed = library.completion(messages=messages, response_format=form, **common).choices[0].message.content
    return {
        "whole": library.completion(messages=messages, **common).choices[0].message.content,
        "streamed": "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices),
        "usage": [found.total_tokens for chunk in chunks if (found := getattr(chunk, "usage", None))],
        "async": asyncio.run(library.acompletion(messages=messages, **common)).choices[0].message.content,
        "call": [call.function.name, arguments],
        "after": library.completion(messages=history, tools=tools, **common).choices[0].message.content,
        "form": json.loads(formed),
        "embeddings": refusal(
            lambda: library.embedding(model=f"openai/{MODEL}", input=["hi"], api_base=url, api_key=KEY)
        ),
    }


def pydantic_ai(url: str) -> dict[str, Any]:
    from pydantic import BaseModel, Field
    from pydantic_ai import Agent, NativeOutput
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    class Place(BaseModel):
        """A place"""

        city: str = Field(max_length=12)

    model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=url, api_key=KEY))
    settings: Any = {"max_tokens": 64, "temperature": 0}
    one_call: Any = {**settings, "parallel_tool_calls": False}
    plain = Agent(model, system_prompt="Be brief.", model_settings=settings)
    calls: list[Any] = []

    def noted(city: str) -> str:
        calls.append(["weather", {"city": city}])
        return weather(city)

    noted.__name__, noted.__doc__ = "weather", weather.__doc__
    tooled = Agent(model, tools=[noted], model_settings=settings)

    async def streamed() -> tuple[str, int]:
        async with plain.run_stream("hi") as answer:
            return "".join([piece async for piece in answer.stream_text(delta=True)]), answer.usage.total_tokens

    text, tokens = asyncio.run(streamed())
    after = tooled.run_sync("go").output
    both = Agent(model, tools=[weather], output_type=NativeOutput(Place), model_settings=settings)
    return {
        "whole": plain.run_sync("hi").output,
        "streamed": text,
        "usage": [tokens],
        "async": asyncio.run(plain.run("hi")).output,
        "call": calls[0],
        "after": after,
        "form": Agent(model, output_type=NativeOutput(Place), model_settings=settings)
        .run_sync("hi")
        .output.model_dump(),
        "forced": Agent(model, output_type=Place, model_settings=one_call).run_sync("hi").output.model_dump(),
        "tools_and_form": both.run_sync("place").output.model_dump(),
    }


def openai_agents(url: str) -> dict[str, Any]:
    return asyncio.run(_openai_agents(url))


async def _openai_agents(url: str) -> dict[str, Any]:
    import agents
    from openai import AsyncOpenAI
    from pydantic import BaseModel, Field

    class Place(BaseModel):
        """A place"""

        city: str = Field(max_length=12)

    agents.set_tracing_disabled(True)
    model = agents.OpenAIChatCompletionsModel(MODEL, openai_client=AsyncOpenAI(base_url=url, api_key=KEY))
    settings = agents.ModelSettings(max_tokens=64, temperature=0, include_usage=True)
    common: dict[str, Any] = {"name": "helper", "model": model, "model_settings": settings}
    plain = agents.Agent(instructions="Be brief.", **common)
    tools = [agents.function_tool(weather)]
    answer = await agents.Runner.run(agents.Agent(tools=tools, **common), "go")
    (call,) = [item.raw_item for item in answer.new_items if item.type == "tool_call_item"]
    run = agents.Runner.run_streamed(plain, "hi")
    events = [e.data async for e in run.stream_events() if e.type == "raw_response_event"]
    formed = await agents.Runner.run(agents.Agent(output_type=Place, **common), "hi")
    both = await agents.Runner.run(agents.Agent(tools=tools, output_type=Place, **common), "place")
    return {
        "streamed": "".join(e.delta for e in events if e.type == "response.output_text.delta"),
        "usage": [run.context_wrapper.usage.total_tokens],
        "async": (await agents.Runner.run(plain, "hi")).final_output,
        "call": [call.name, json.loads(call.arguments)],
        "after": answer.final_output,
        "form": formed.final_output.model_dump(),
        "tools_and_form": both.final_output.model_dump(),
    }


def smolagents(url: str) -> dict[str, Any]:
    import smolagents as library

    model = library.OpenAIServerModel(MODEL, api_base=url, api_key=KEY, max_tokens=64, temperature=0)
    agent = library.ToolCallingAgent(tools=[library.tool(described)], model=model, max_steps=2, verbosity_level=0)
    agent.run("go")
    steps = [step for step in agent.memory.steps if isinstance(step, library.ActionStep)]
    chunks = list(model.generate_stream([library.ChatMessage(role="user", content="hi")]))
    return {
        "whole": model.generate([library.ChatMessage(role=m["role"], content=m["content"]) for m in MESSAGES]).content,
        "streamed": "".join(chunk.content or "" for chunk in chunks),
        "usage": [u.input_tokens + u.output_tokens for chunk in chunks if (u := chunk.token_usage)],
        "steps": len(steps),
        "failures": [str(step.error) for step in steps if "Error code" in str(step.error)],
    }


def described(city: str) -> str:
    """Weather in a city

    Args:
        city: a city's name
    """
    return weather(city)


def refusal(ask: Callable[[], Any]) -> str:
    """What the library says of the server's refusal."""
    try:
        return f"answered: {ask()}"
    except Exception as problem:
        return str(problem)


LIBRARIES = {f.__name__: f for f in (langchain, llama_index, litellm, pydantic_ai, openai_agents, smolagents)}

if __name__ == "__main__":
    print(json.dumps(LIBRARIES[sys.argv[1]](sys.argv[2])))
