"""The verb decide: predictions in, every row on exactly one of four routes out, with a reason a person can read."""
