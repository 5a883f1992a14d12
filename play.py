"""Talk to a policy that runs elsewhere. So far: Client, the other end of sample.py serve; no torch on this machine.

    from play import Client
    policy = Client("192.168.1.20", 5555)          # on the other machine: python sample.py serve --ckpt F --host 0.0.0.0 --key SECRET
    policy.predict(rgb)                            # uint8 (h, w, 3) -> float32 (T, 25), file convention (extract.py, section "the action")
    policy.reset(); policy.info()                  # the same three methods as sample.Session

The messages are described where they are packed, in extract.py.
"""
import multiprocessing.connection as mpc

from extract import MESSAGE_LIMIT, UserError, pack_message, shrink, unpack_message


class Client:
    """A session on a server: the frames it has seen are its own, other clients have theirs."""
    def __init__(self, host="127.0.0.1", port=5555, key=None, timeout=60.0):
        self.where, self.timeout, self.connection = f"{host}:{port}", timeout, None
        try:
            self.connection = mpc.Client((host, port), "AF_INET")
            if key:
                self._wait("a request for the key; the server has none: leave out --key")
                mpc.answer_challenge(self.connection, key.encode())
                mpc.deliver_challenge(self.connection, key.encode())
        except (mpc.AuthenticationError, AssertionError, ValueError):      # Python 3.11's handshake asserts
            raise UserError(f"server {self.where}: the key is wrong: give the server's --key") from None
        except (OSError, EOFError) as e:
            raise UserError(f"server {self.where}: expected a server, found {e or 'a closed connection'}: start one with python sample.py serve") from None
        self.info()

    def _wait(self, expected):
        if not self.connection.poll(self.timeout):
            self.close()
            raise UserError(f"server {self.where}: expected {expected}, found no answer in {self.timeout:g} s")

    def _ask(self, header, array=None):
        if self.connection is None:
            raise UserError(f"server {self.where}: the connection is closed: make a new Client")
        try:
            self.connection.send_bytes(pack_message(header, array))
            self._wait("an answer")
            message = self.connection.recv_bytes(MESSAGE_LIMIT)
        except (OSError, EOFError) as e:
            self.close()
            raise UserError(f"server {self.where}: the connection broke ({e or 'closed by the server'}): is the server still running?") from None
        if message.startswith(b"#CHALLENGE#"):
            self.close()
            raise UserError(f"server {self.where}: asks for a key: give its --key")
        try:
            header, array = unpack_message(message)
        except ValueError as e:
            self.close()
            raise UserError(f"server {self.where}: expected sample.py serve, found something else ({e}): check the port") from None
        if "error" in header:
            raise UserError(f"server {self.where}: {header['error']}")
        return header, array

    def predict(self, rgb):
        """uint8 (h, w, 3) -> float32 (T, 25). The frame is shrunk here, so that 200 kB travel and not 6 MB."""
        return self._ask({"do": "predict"}, shrink(rgb))[1]

    def reset(self, **what):
        """Forget the frames seen so far; seed= and game= as in sample.Session.reset."""
        self._ask({"do": "reset", **what})

    def info(self):
        return self._ask({"do": "info"})[0]

    def close(self):
        if self.connection is not None:
            self.connection.close()
            self.connection = None
