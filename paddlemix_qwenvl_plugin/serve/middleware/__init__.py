"""ASGI middleware, without Starlette's BaseHTTPMiddleware: nothing buffers streams or hides a client's disconnect."""
