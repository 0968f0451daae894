"""The judgement of a connection's messages, without input or output."""
