"""A table of goods to look things up in."""

from __future__ import annotations

# English name, Chinese name; price in yuan, weight in grams, pieces in stock
GOODS = (
    ("apple", "苹果", 4, 180, 62), ("pear", "梨", 3, 170, 48), ("banana", "香蕉", 2, 120, 95),
    ("orange", "橙子", 5, 200, 71), ("lemon", "柠檬", 6, 90, 33), ("mango", "芒果", 12, 310, 24),
    ("melon", "甜瓜", 18, 1400, 15), ("peach", "桃子", 7, 150, 56), ("plum", "李子", 1, 60, 88),
    ("grape", "葡萄", 16, 500, 29), ("bread", "面包", 9, 400, 41), ("cheese", "奶酪", 35, 250, 18),
    ("milk", "牛奶", 8, 1030, 52), ("egg", "鸡蛋", 1, 55, 240), ("rice", "大米", 28, 5000, 37),
    ("tea", "茶叶", 45, 100, 66), ("coffee", "咖啡", 52, 250, 43), ("sugar", "白糖", 11, 1000, 59),
    ("salt", "食盐", 3, 500, 77), ("pepper", "胡椒", 14, 50, 31), ("honey", "蜂蜜", 38, 450, 22),
    ("butter", "黄油", 24, 200, 27), ("soap", "肥皂", 5, 110, 84), ("candle", "蜡烛", 4, 80, 91),
    ("pen", "钢笔", 19, 25, 64), ("pencil", "铅笔", 2, 8, 310), ("book", "书", 33, 620, 46),
    ("cup", "杯子", 15, 340, 53), ("plate", "盘子", 13, 560, 39), ("spoon", "勺子", 6, 45, 120),
    ("knife", "刀", 29, 95, 34), ("lamp", "台灯", 89, 1250, 12), ("chair", "椅子", 145, 4800, 9),
    ("table", "桌子", 380, 16000, 4), ("clock", "钟", 76, 730, 17), ("umbrella", "雨伞", 58, 410, 21),
    ("bag", "书包", 99, 850, 26), ("shoe", "鞋子", 168, 690, 32), ("hat", "帽子", 42, 130, 44),
    ("towel", "毛巾", 21, 260, 73),
)  # fmt: skip
COLUMNS = {"price": 2, "weight": 3, "stock": 4, "价格": 2, "重量": 3, "库存": 4}
_ROWS = {name: row for row in GOODS for name in row[:2]}


def look_up(item: str, column: str) -> int:
    """Price, weight or stock of an item in the shop's table."""
    row = _ROWS.get(item.strip().lower())
    if row is None:
        raise ValueError(f"the table has no item {item}")
    if column.strip().lower() not in COLUMNS:
        raise ValueError(f"the table has no column {column}; choose from {', '.join(COLUMNS)}")
    return int(row[COLUMNS[column.strip().lower()]])
