// What two OAuth clients of others find of a server: a JSON document of check -> "ok" or what was wrong. Its input comes by stdin.
import { readFileSync } from "node:fs";
import * as oauth from "oauth4webapi";
import * as openid from "openid-client";

const given = JSON.parse(readFileSync(0, "utf8"));
const issuer = new URL(given.issuer);
const insecure = { [oauth.allowInsecureRequests]: true }; // plain HTTP, on loopback
const api = new URL("/v1/sources", issuer);
const told = {};
const others = await oauth.generateKeyPair("ES256");

async function check(name, run) {
  try {
    await run();
    told[name] = "ok";
  } catch (error) {
    told[name] = `${error.name} ${error.code ?? ""} ${error.error ?? ""} ${error.message} ${JSON.stringify(error.cause ?? null)}`;
  }
}

function expect(holds, what) {
  if (!holds) throw new Error(what);
}

async function refused(run, ...codes) {
  try {
    await run();
  } catch (error) {
    expect(codes.includes(error.error) || codes.includes(error.status), `another refusal: ${error.error} ${error.status} ${error.message}`);
    return error;
  }
  throw new Error("it was not refused");
}

const algorithms = { ES256: { name: "ECDSA", namedCurve: "P-256" }, Ed25519: { name: "Ed25519" } };
const importKey = (jwk, alg) => crypto.subtle.importKey("jwk", jwk, algorithms[alg], false, ["sign"]);

// oauth4webapi
let as;
await check("oauth4webapi: discovery", async () => {
  as = await oauth.processDiscoveryResponse(issuer, await oauth.discoveryRequest(issuer, { algorithm: "oauth2", ...insecure }));
  expect(as.issuer === given.issuer, "another issuer");
});
await check("oauth4webapi: protected-resource metadata", async () => {
  const found = await oauth.processResourceDiscoveryResponse(issuer, await oauth.resourceDiscoveryRequest(issuer, insecure));
  expect(found.authorization_servers.includes(as.issuer), "another authorization server");
});

const clients = {
  client_secret_basic: [given.secret.id, oauth.ClientSecretBasic(given.secret.secret)],
  client_secret_post: [given.secret.id, oauth.ClientSecretPost(given.secret.secret)],
};
for (const alg of ["ES256", "Ed25519"]) {
  clients[`private_key_jwt ${alg}`] = [given[alg].id, oauth.PrivateKeyJwt(await importKey(given[alg].jwk, alg))];
}
const token = async (client, auth, options = {}, parameters = {}) =>
  oauth.processClientCredentialsResponse(
    as, client, await oauth.clientCredentialsGrantRequest(as, client, auth, parameters, { ...insecure, ...options }));

for (const [name, [client_id, auth]] of Object.entries(clients)) {
  await check(`oauth4webapi: ${name}`, async () => {
    const client = { client_id };
    const got = await token(client, auth);
    expect(got.token_type === "bearer" && got.expires_in <= 600, "another token");
    const request = new Request(api, { headers: { authorization: `Bearer ${got.access_token}` } });
    const claims = await oauth.validateJwtAccessToken(as, request, as.issuer, insecure);
    expect(claims.client_id === client_id && claims.sub === client_id, "of another client");
    const answer = await oauth.protectedResourceRequest(got.access_token, "GET", api, undefined, null, insecure);
    expect(answer.status === 200, `the API said ${answer.status}`);
    const introspect = async () => oauth.processIntrospectionResponse(
      as, client, await oauth.introspectionRequest(as, client, auth, got.access_token, insecure));
    expect((await introspect()).active === true, "not active");
    await oauth.processRevocationResponse(await oauth.revocationRequest(as, client, auth, got.access_token, insecure));
    expect((await introspect()).active === false, "still active");
    const error = await refused(
      () => oauth.protectedResourceRequest(got.access_token, "GET", api, undefined, null, insecure), 401);
    expect(error.cause.some((each) => each.parameters.resource_metadata), "no metadata in the challenge");
  });
}
await check("oauth4webapi: wrong credentials", async () => {
  const client = { client_id: given.secret.id };
  await refused(() => token(client, oauth.ClientSecretBasic("cls_wrong")), 401);
  await refused(() => token(client, oauth.ClientSecretBasic(given.secret.secret), {}, { scope: "everything" }), "invalid_scope");
  await refused(() => token({ client_id: given.ES256.id }, oauth.ClientSecretPost(given.secret.secret)), 401);
});
for (const alg of ["ES256", "Ed25519"]) {
  await check(`oauth4webapi: DPoP ${alg}`, async () => {
    const client = { client_id: given.bound.id };
    const auth = oauth.ClientSecretBasic(given.bound.secret);
    await refused(() => token(client, auth), "invalid_dpop_proof");
    const DPoP = oauth.DPoP(client, await oauth.generateKeyPair(alg));
    const got = await token(client, auth, { DPoP });
    expect(got.token_type === "dpop", "not bound");
    const ask = (more) => oauth.protectedResourceRequest(got.access_token, "GET", api, undefined, null, { ...insecure, ...more });
    expect((await ask({ DPoP })).status === 200, "refused");
    expect((await ask({ DPoP })).status === 200, "refused the second time");
    await refused(() => ask({}), 401); // as Bearer
    await refused(() => ask({ DPoP: oauth.DPoP(client, others) }), 401);
  });
}

// openid-client
const discovered = (id, auth) =>
  openid.discovery(issuer, id, undefined, auth, { algorithm: "oauth2", execute: [openid.allowInsecureRequests] });
for (const [name, id, auth] of [
  ["a secret", given.secret.id, openid.ClientSecretBasic(given.secret.secret)],
  ["a key", given.ES256.id, openid.PrivateKeyJwt(await importKey(given.ES256.jwk, "ES256"))],
]) {
  await check(`openid-client: ${name}`, async () => {
    const config = await discovered(id, auth);
    const got = await openid.clientCredentialsGrant(config);
    const answer = await openid.fetchProtectedResource(config, got.access_token, api, "GET");
    expect(answer.status === 200, `the API said ${answer.status}`);
    expect((await openid.tokenIntrospection(config, got.access_token)).active === true, "not active");
    await openid.tokenRevocation(config, got.access_token);
    expect((await openid.tokenIntrospection(config, got.access_token)).active === false, "still active");
  });
}
await check("openid-client: DPoP", async () => {
  const config = await discovered(given.bound.id, openid.ClientSecretPost(given.bound.secret));
  const DPoP = openid.getDPoPHandle(config, await openid.randomDPoPKeyPair());
  const got = await openid.clientCredentialsGrant(config, undefined, { DPoP });
  const answer = await openid.fetchProtectedResource(config, got.access_token, api, "GET", undefined, undefined, { DPoP });
  expect(answer.status === 200, `the API said ${answer.status}`);
});

process.stdout.write(JSON.stringify(told));
