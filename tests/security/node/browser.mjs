// A real browser signs in, is asked and allows an app, then a device. Its input comes by stdin; its answer is where the app was called back.
import { readFileSync } from "node:fs";
import { chromium } from "playwright-core";

const given = JSON.parse(readFileSync(0, "utf8"));
const browser = await chromium.launch({ executablePath: given.chromium, args: ["--no-sandbox"] });
try {
  const context = await browser.newContext({ javaScriptEnabled: false });
  const page = await context.newPage();
  const complaints = [];
  page.on("console", (message) => complaints.push(message.text()));
  let back = null;
  await page.route(`${given.redirect_uri}?**`, (route) => {
    back = route.request().url();
    return route.fulfill({ status: 200, contentType: "text/plain", body: "back at the app" });
  });
  await page.goto(given.authorize);
  await page.getByLabel("Account").fill(given.account);
  await page.getByLabel("Passphrase").fill(given.passphrase);
  await page.getByLabel("Code").fill(given.code);
  await page.getByRole("button", { name: "Sign in" }).click();
  await page.getByRole("button", { name: "Allow", exact: true }).click();
  await page.waitForURL(`${given.redirect_uri}?**`);
  await page.goto(given.device);
  await page.getByRole("button", { name: "Continue" }).click();
  await page.getByRole("button", { name: "Allow", exact: true }).click();
  const heading = await page.getByRole("heading", { level: 1 }).textContent();
  process.stdout.write(JSON.stringify({ back, heading, complaints }));
} finally {
  await browser.close();
}
