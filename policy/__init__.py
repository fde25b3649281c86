"""The policy language and its one evaluator: pure and total."""
