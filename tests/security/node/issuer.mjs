// An authorization server of others: the first line of stdin is {audience, subject, secret}; the first of stdout says where it is. From
// then on each line in, whatever it holds, is answered with {token}, for that audience; it ends with stdin.
import { createServer } from "node:http";
import { once } from "node:events";
import { createInterface } from "node:readline";
import { generateKeyPair, exportJWK } from "jose";
import Provider from "oidc-provider";

console.info = console.warn = console.error; // it tells of itself, and stdout is ours
const lines = createInterface({ input: process.stdin })[Symbol.asyncIterator]();
const given = JSON.parse((await lines.next()).value);
const say = (told) => process.stdout.write(`${JSON.stringify(told)}\n`);

const server = createServer();
server.listen(0, "127.0.0.1");
await once(server, "listening");
const issuer = `http://127.0.0.1:${server.address().port}`;

const { privateKey } = await generateKeyPair("RS256", { extractable: true });
const key = { ...(await exportJWK(privateKey)), kid: "its-key", use: "sig", alg: "RS256" };
const provider = new Provider(issuer, {
  jwks: { keys: [key] },
  clients: [{
    client_id: given.subject, client_secret: given.secret, grant_types: ["client_credentials"], redirect_uris: [], response_types: [],
  }],
  ttl: { ClientCredentials: 600 },
  features: {
    devInteractions: { enabled: false },
    clientCredentials: { enabled: true },
    resourceIndicators: {
      enabled: true,
      getResourceServerInfo: () => ({
        scope: "", audience: given.audience, accessTokenFormat: "jwt", accessTokenTTL: 600, jwt: { sign: { alg: "RS256" } },
      }),
    },
  },
});
server.on("request", provider.callback());
say({ issuer });

for await (const _ of lines) {
  const answer = await fetch(`${issuer}/token`, {
    method: "POST",
    headers: { authorization: `Basic ${btoa(`${given.subject}:${given.secret}`)}` },
    body: new URLSearchParams({ grant_type: "client_credentials", resource: given.audience }),
  });
  const told = await answer.json();
  say({ token: told.access_token ?? null, error: told.error_description ?? told.error });
}
server.close();
server.closeAllConnections();
