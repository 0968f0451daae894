"""The judgement of one connection's messages, without input or output."""
