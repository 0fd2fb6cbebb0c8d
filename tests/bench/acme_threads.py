"""The Python ACME library as it is documented: one `acme.client.ClientV2` over requests, shared by threads.

`python acme_threads.py DIRECTORY CA_FILE HTTP_PORT FOLDER THREADS` with the names on stdin leaves NAME.crt, NAME.key.
"""

import collections
import os
import sys
import threading
from datetime import datetime, timedelta
from pathlib import Path

import josepy
from acme import challenges, client, crypto_util, messages, standalone
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

LIMIT = timedelta(seconds=90)
TRIES = 3
Resource = standalone.HTTP01RequestHandler.HTTP01Resource


def connect(directory_url: str) -> tuple[client.ClientV2, josepy.JWKEC]:
    key = josepy.JWKEC(key=ec.generate_private_key(ec.SECP256R1()))
    network = client.ClientNetwork(key, alg=josepy.ES256, user_agent="acme-threads")
    acme = client.ClientV2(client.ClientV2.get_directory(directory_url, network), net=network)
    acme.new_account(messages.NewRegistration.from_data(email="bench@example.test", terms_of_service_agreed=True))
    return acme, key


def issue(acme: client.ClientV2, key: josepy.JWKEC, resources: set[Resource], name: str) -> tuple[bytes, str]:
    plain = serialization.NoEncryption()
    private = ec.generate_private_key(ec.SECP256R1())
    key_pem = private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    order, answered = acme.new_order(crypto_util.make_csr(key_pem, [name])), []
    for authorization in order.authorizations:
        body = next(one for one in authorization.body.challenges if isinstance(one.chall, challenges.HTTP01))
        response, validation = body.response_and_validation(key)
        answered.append(Resource(chall=body.chall, response=response, validation=validation))
        resources.add(answered[-1])
        acme.answer_challenge(body, response)
    order = acme.poll_and_finalize(order, datetime.now() + LIMIT)  # noqa: DTZ005 - naive is what it takes
    resources.difference_update(answered)
    return key_pem, order.fullchain_pem


def main(directory_url: str, ca_file: str, http_port: str, folder: str, threads: str) -> None:
    os.environ["REQUESTS_CA_BUNDLE"] = ca_file
    names = collections.deque(sys.stdin.read().split())
    acme, key = connect(directory_url)
    resources: set[Resource] = set()
    server = standalone.HTTP01Server(("127.0.0.1", int(http_port)), resources)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def work() -> None:
        while names:
            try:
                name = names.popleft()
            except IndexError:
                return
            for attempt in range(TRIES):
                try:
                    key_pem, chain = issue(acme, key, resources, name)
                except Exception as error:  # noqa: BLE001 - such as a set that changes while the server walks it
                    print(f"{name}, attempt {attempt}: {error!r}", file=sys.stderr)
                else:
                    Path(folder, f"{name}.key").write_bytes(key_pem)
                    Path(folder, f"{name}.crt").write_text(chain)
                    break

    workers = [threading.Thread(target=work) for _ in range(int(threads))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)
