// What two OAuth clients of others find where an app acts for a person. The first line of stdin is what is given; then, for each JSON
// line {"visit": URL} on stdout, a person goes there, allows it, and the next line of stdin is where the browser ended.
import { createInterface } from "node:readline";
import * as oauth from "oauth4webapi";
import * as openid from "openid-client";

const lines = createInterface({ input: process.stdin })[Symbol.asyncIterator]();
const next = async () => JSON.parse((await lines.next()).value);
const visit = async (url) => {
  process.stdout.write(`${JSON.stringify({ visit: String(url) })}\n`);
  return new URL(await next());
};

const given = await next();
const issuer = new URL(given.issuer);
const insecure = { [oauth.allowInsecureRequests]: true }; // plain HTTP, on loopback
const api = new URL("/v1/sources", issuer);
const told = {};

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

async function refused(run, code) {
  try {
    await run();
  } catch (error) {
    expect(error.error === code || error.status === code, `another refusal: ${error.error} ${error.status} ${error.message}`);
    return;
  }
  throw new Error("it was not refused");
}

// oauth4webapi
const as = await oauth.processDiscoveryResponse(issuer, await oauth.discoveryRequest(issuer, { algorithm: "oauth2", ...insecure }));
const publicClient = [{ client_id: given.public.id }, oauth.None()];
const secretClient = [{ client_id: given.secret.id }, oauth.ClientSecretBasic(given.secret.secret)];

async function byCode([client, auth], options = {}, more = {}) {
  const verifier = oauth.generateRandomCodeVerifier();
  const state = oauth.generateRandomState();
  const url = new URL(as.authorization_endpoint);
  for (const [name, value] of Object.entries({
    client_id: client.client_id, redirect_uri: given.redirect_uri, response_type: "code", state,
    code_challenge: await oauth.calculatePKCECodeChallenge(verifier), code_challenge_method: "S256", ...more,
  })) url.searchParams.set(name, value);
  const back = oauth.validateAuthResponse(as, client, await visit(url), state); // its iss, too
  return oauth.processAuthorizationCodeResponse(as, client, await oauth.authorizationCodeGrantRequest(
    as, client, auth, back, given.redirect_uri, verifier, { ...insecure, ...options }));
}
const refresh = async ([client, auth], token, options = {}) => oauth.processRefreshTokenResponse(
  as, client, await oauth.refreshTokenGrantRequest(as, client, auth, token, { ...insecure, ...options }));
const ask = (token, options = {}) => oauth.protectedResourceRequest(token, "GET", api, undefined, null, { ...insecure, ...options });

for (const [name, who] of [["a public client", publicClient], ["a client with a secret", secretClient]]) {
  await check(`oauth4webapi: code and refresh, ${name}`, async () => {
    const [client, auth] = who;
    const first = await byCode(who);
    const request = new Request(api, { headers: { authorization: `Bearer ${first.access_token}` } });
    const claims = await oauth.validateJwtAccessToken(as, request, as.issuer, insecure);
    expect(claims.sub === given.person && claims.client_id === client.client_id, "of somebody else");
    expect((await ask(first.access_token)).status === 200, "refused");
    const second = await refresh(who, first.refresh_token);
    expect((await ask(second.access_token)).status === 200, "refused after the refresh");
    expect(second.refresh_token !== first.refresh_token, "not another refresh token");
    await oauth.processRevocationResponse(await oauth.revocationRequest(as, client, auth, second.refresh_token, insecure));
    await refused(() => ask(second.access_token), 401);
    await refused(() => refresh(who, second.refresh_token), "invalid_grant");
  });
}
await check("oauth4webapi: a refresh token that was used ends the login", async () => {
  const first = await byCode(publicClient);
  const second = await refresh(publicClient, first.refresh_token);
  await refused(() => refresh(publicClient, first.refresh_token), "invalid_grant");
  await refused(() => refresh(publicClient, second.refresh_token), "invalid_grant");
  await refused(() => ask(second.access_token), 401);
});
await check("oauth4webapi: introspection of a person's tokens", async () => {
  const [client, auth] = secretClient;
  const got = await byCode(secretClient);
  for (const [token, is] of [[got.access_token, true], [got.refresh_token, true], ["noise", false]]) {
    const found = await oauth.processIntrospectionResponse(as, client, await oauth.introspectionRequest(as, client, auth, token, insecure));
    expect(found.active === is, `active: ${found.active}`);
    if (is) expect(found.sub === given.person, "of somebody else");
  }
});
await check("oauth4webapi: DPoP-bound code and refresh", async () => {
  const pair = await oauth.generateKeyPair("ES256");
  const DPoP = oauth.DPoP(publicClient[0], pair);
  const first = await byCode(publicClient, { DPoP }, { dpop_jkt: await DPoP.calculateThumbprint() });
  expect(first.token_type === "dpop", "not bound");
  expect((await ask(first.access_token, { DPoP })).status === 200, "refused");
  await refused(() => ask(first.access_token), 401);
  await refused(() => refresh(publicClient, first.refresh_token), "invalid_grant");
  const others = oauth.DPoP(publicClient[0], await oauth.generateKeyPair("ES256"));
  await refused(() => refresh(publicClient, first.refresh_token, { DPoP: others }), "invalid_grant");
  const second = await refresh(publicClient, first.refresh_token, { DPoP });
  expect((await ask(second.access_token, { DPoP })).status === 200, "refused after the refresh");
});
await check("oauth4webapi: device flow", async () => {
  const [client, auth] = publicClient;
  const device = await oauth.processDeviceAuthorizationResponse(
    as, client, await oauth.deviceAuthorizationRequest(as, client, auth, {}, insecure));
  const poll = async () => oauth.processDeviceCodeResponse(
    as, client, await oauth.deviceCodeGrantRequest(as, client, auth, device.device_code, insecure));
  await refused(poll, "authorization_pending");
  await visit(device.verification_uri_complete);
  const got = await poll();
  expect((await ask(got.access_token)).status === 200, "refused");
  await refused(poll, "invalid_grant");
});

// openid-client
const options = { algorithm: "oauth2", execute: [openid.allowInsecureRequests] };
await check("openid-client: code, refresh, revocation", async () => {
  const config = await openid.discovery(issuer, given.public.id, undefined, openid.None(), options);
  const pkceCodeVerifier = openid.randomPKCECodeVerifier();
  const state = openid.randomState();
  const back = await visit(openid.buildAuthorizationUrl(config, {
    redirect_uri: given.redirect_uri, state, code_challenge: await openid.calculatePKCECodeChallenge(pkceCodeVerifier), code_challenge_method: "S256",
  }));
  const first = await openid.authorizationCodeGrant(config, back, { pkceCodeVerifier, expectedState: state });
  const second = await openid.refreshTokenGrant(config, first.refresh_token);
  expect((await openid.fetchProtectedResource(config, second.access_token, api, "GET")).status === 200, "refused");
  await openid.tokenRevocation(config, second.refresh_token);
  await refused(() => openid.refreshTokenGrant(config, second.refresh_token), "invalid_grant");
});
await check("openid-client: device flow", async () => {
  const config = await openid.discovery(issuer, given.public.id, undefined, openid.None(), options);
  const device = await openid.initiateDeviceAuthorization(config, {});
  await visit(device.verification_uri_complete);
  const got = await openid.pollDeviceAuthorizationGrant(config, device);
  expect((await openid.fetchProtectedResource(config, got.access_token, api, "GET")).status === 200, "refused");
});

process.stdout.write(`${JSON.stringify(told)}\n`);
process.exit(0);
