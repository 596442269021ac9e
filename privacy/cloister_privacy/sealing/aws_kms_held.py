"""A customer's own KMS key: Cloister wraps under it, did not make it, and can never destroy it. Knows no aliases and no other key.

A wrapped key is `cloister.aws-kms-held/1\\n`, the KMS key's own id behind its length, and KMS' ciphertext.
"""

from __future__ import annotations

import hmac
import re
import secrets

from cloister_privacy.sealing.context import Context
from cloister_privacy.sealing.errors import InvalidAnswer, KeyMissing
from cloister_privacy.sealing.kms_calls import KMSCalls, encryption_context
from cloister_privacy.sealing.provider import Destruction, check_key_id

__all__ = ["HeldAWSKMSKeyProvider"]

_LINE = b"cloister.aws-kms-held/1\n"
_ARN = re.compile(r"arn:aws[a-z-]*:kms:(?P<region>[a-z0-9-]{1,64}):[0-9]{12}:key/[a-zA-Z0-9-]{1,128}")
_FIT = {
    "KeyManager": ("CUSTOMER",),
    "KeySpec": ("SYMMETRIC_DEFAULT",),
    "KeyUsage": ("ENCRYPT_DECRYPT",),
}
"""Where its material comes from, and in which regions it is, is the customer's choice."""
_DESTRUCTION = Destruction(
    waiting_days=0,
    claim="The key is the customer's own, in AWS KMS. It was not destroyed here and cannot be: only the customer can disable it, "
    "withdraw it or delete it. What is destroyed here are the data keys that were wrapped under it; whoever has a copy of "
    "one can open it for as long as the customer lets the key be used.",
    is_ours=False,
)


class HeldAWSKMSKeyProvider:
    """A KeyProvider under one KMS key of a customer's, which all ids share: the encryption context keeps them apart.

    The customer revokes by disabling the key, by its deletion, or by withdrawing our permission: KeyWithheld from then
    on. `destroy_key` leaves the key as it is.
    """

    __slots__ = ("_arn", "_kms")

    def __init__(
        self,
        *,
        key_arn: str,
        endpoint_url: str | None = None,
        access_key_id: str | None = None,
        secret_access_key: str | None = None,
        session_token: str | None = None,
        timeout_s: float = 10.0,
    ) -> None:
        """Ask KMS nothing: what is wrapped under a key that is revoked, or away, can still be shredded.

        The ARN names the region, and the key itself, since an alias can be moved to another key. Without credentials
        here, AWS' own chain finds them. Raises ProviderMissing, and ValueError for what is no such ARN.
        """
        match = _ARN.fullmatch(key_arn)
        if match is None:
            raise ValueError("give the ARN of the key itself: arn:aws:kms:REGION:ACCOUNT:key/ID; an alias can be moved")
        self._arn = key_arn
        self._kms = KMSCalls(
            line=_LINE,
            fit=_FIT,
            region=match["region"],
            endpoint_url=endpoint_url,
            access_key_id=access_key_id,
            secret_access_key=secret_access_key,
            session_token=session_token,
            timeout_s=timeout_s,
        )

    @property
    def destruction(self) -> Destruction:
        return _DESTRUCTION

    def __repr__(self) -> str:
        return f"HeldAWSKMSKeyProvider({self._arn!r})"

    def create_key(self, key_id: str) -> None:
        """Prove by a throwaway secret that the customer's key wraps and unwraps; nothing is made.

        Never KeyExists: an id is known to nobody here, so whoever calls makes ids that are new. Raises KeyWithheld where
        the key is disabled, of another kind, not there, or not for us.
        """
        secret, context = secrets.token_bytes(32), Context(tenant="cloister", kind="trial", object="trial")
        back = self.unwrap(key_id, self.wrap(key_id, secret, context=context), context=context)
        if not hmac.compare_digest(back, secret):
            raise InvalidAnswer("AWS KMS gave back another secret than it was given; see what listens at the endpoint")

    def has_key(self, key_id: str) -> bool:
        """Whether the customer's key is there and enabled, whatever the id. Raises KeyUnfit where it is disabled."""
        check_key_id(key_id)
        try:
            self._kms.require_usable(self._arn, key_id)
        except KeyMissing:
            return False
        return True

    def wrap(self, key_id: str, key: bytes, *, context: Context) -> bytes:
        """Encrypt a secret of up to 4,096 bytes in KMS, bound to the id and to its context."""
        check_key_id(key_id)
        return self._kms.wrap(self._arn, key_id, key, context=_context(key_id, context))

    def unwrap(self, key_id: str, wrapped: bytes, *, context: Context) -> bytes:
        """The secret that was wrapped. Raises InvalidWrap, or KeyWithheld once the customer has revoked the key."""
        check_key_id(key_id)
        return self._kms.unwrap(self._arn, key_id, wrapped, context=_context(key_id, context))

    def destroy_key(self, key_id: str) -> None:
        """Leave the customer's key as it is, and ask KMS nothing: a key that is revoked holds no shredding up."""
        check_key_id(key_id)


def _context(key_id: str, context: Context) -> dict[str, str]:
    return {"cloister:key-id": key_id, **encryption_context(context)}
