"""What every HTTP request passes through. Pure ASGI: nothing here holds a stream back or hides a client that left."""
