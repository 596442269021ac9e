"""What crosses the wire or outlives a process, shared by the SDK, the privacy library and the server.

Requests forbid unknown fields, responses ignore them. Knows pydantic, numpy and cryptography; nothing of HTTP, SQL or torch.
"""
