"""Values that real datasets have contained, and worse, for every field of a row and of its messages."""

ODD = [None, "", " ", "x", 5, 10**400, -1, float("nan"), True, [], {}, ["x"], [5], {"x": 1}, [[]], [{}], [None], "{",
       "[[1]]", "null", "\ud83d", [{"role": "user"}], {"role": "assistant", "content": "x"}, [{"name": "f"}],
       "9" * 5000, "[" * 5000, [{"function": "f"}], [{"function": {"name": 5}}], {"tools": []}, b"x"]  # fmt: skip
