"""What the web chat says, in English and Chinese."""

from __future__ import annotations

LANGUAGES = {"en": "English", "zh": "中文"}

TEXT: dict[str, tuple[str, str]] = {
    "tagline": ("A small model, trained from nothing, on this machine.", "从零训练的小模型，就在这台机器上运行。"),
    "ask": ("Ask MiniMind anything", "向 MiniMind 提问"),
    "try": ("Try one of these", "试试这些问题"),
    "language": ("Language", "语言"),
    "model": ("Model", "模型"),
    "new": ("New chat", "新对话"),
    "stop": ("Stop", "停止"),
    "sampling": ("Sampling", "采样"),
    "temperature": ("Temperature", "温度"),
    "temperature_help": ("0 takes the likeliest token", "0 表示总取最可能的词元"),
    "top_p": ("Top p", "Top p"),
    "top_p_help": ("draw from the smallest set of tokens of this probability", "只在概率之和达到该值的最小集合中采样"),
    "repetition": ("Repetition penalty", "重复惩罚"),
    "repetition_help": ("above 1, words that occurred become less likely", "大于 1 时，出现过的词更不易再出现"),
    "max_tokens": ("Longest answer, tokens", "回答长度上限（词元）"),
    "seed": ("Seed", "随机种子"),
    "seed_help": ("the same seed, the same answer; empty: another each time", "相同种子得到相同回答；留空则每次不同"),
    "thinking": ("Thinking", "思考"),
    "auto": ("Auto", "自动"),
    "on": ("On", "开"),
    "off": ("Off", "关"),
    "system": ("System message", "系统提示词"),
    "tools": ("Tools", "工具"),
    "tools_on": ("Offer tools to the model", "向模型提供工具"),
    "tools_json": ("JSON list, as OpenAI's", "JSON 列表，格式同 OpenAI"),
    "thinking_now": ("Thinking", "思考中"),
    "thought": ("Thought for {:.1f} s", "思考了 {:.1f} 秒"),
    "calls": ("Calls {}", "调用 {}"),
    "result_of": ("Result of {}", "{} 的结果"),
    "send_result": ("Send", "发送"),
    "result": ("Result", "结果"),
    "stopped": ("stopped", "已停止"),
    "cut": ("cut at the longest answer", "已到长度上限"),
    "dropped": ("the oldest {} rounds no longer fit", "最早的 {} 轮已放不下"),
    "figures": ("{} tokens, the first in {:.0f} ms", "{} 个词元，首词元 {:.0f} 毫秒"),
    "rate": ("{:.0f} tokens/s", "{:.0f} 词元/秒"),
    "unreachable": ("No server answers at {}. Start one: minimind serve", "{} 没有服务响应。请启动：minimind serve"),
    "refused": ("The server at {} refuses: {}", "{} 的服务拒绝了请求：{}"),
}

SUGGESTIONS = {
    "en": ("Who are you?", "What is the capital of France?", "What is 8 + 6?", "What is horse in Chinese?"),
    "zh": ("你是谁？", "“火”的英文是什么？", "法国的首都是哪里？", "8加6等于多少？"),
}


def text(name: str, language: str, *values: object) -> str:
    return TEXT[name][list(LANGUAGES).index(language)].format(*values)
