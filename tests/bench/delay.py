"""Makes a CA farther away: `python -m tests.bench.delay PORT SECONDS` passes on TCP to that loopback port.

What is sent arrives half of the time later, and what comes back the other half. It prints the port that it listens at.
Pebble builds its URLs from the Host header, so that a client that begins here stays here.
"""

import asyncio
import sys

HOST = "127.0.0.1"


async def main(port: int, seconds: float) -> None:
    loop = asyncio.get_running_loop()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            loop.call_later(seconds / 2, writer.write, data)
        loop.call_later(seconds / 2, writer.close)

    async def join(near_reader: asyncio.StreamReader, near_writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(HOST, port)
        await asyncio.gather(pump(near_reader, far_writer), pump(far_reader, near_writer), return_exceptions=True)

    server = await asyncio.start_server(join, HOST, 0, backlog=512)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), float(sys.argv[2])))
