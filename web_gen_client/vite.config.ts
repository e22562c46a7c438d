import { fileURLToPath } from 'node:url';
import { defineConfig } from 'vite';

// The server of `npm run dev` hands what it does not know to a running `diffusion-workers serve`.
const api = ['/generate', '/plan', '/preprocess', '/jobs', '/models', '/memory-info', '/health', '/ready', '/metrics', '/openapi.json'];
const server = process.env['DIFFUSION_WORKERS_URL'] ?? 'http://127.0.0.1:8000';

export default defineConfig({
  base: './',
  resolve: { alias: { 'ez-diffusion-client': fileURLToPath(new URL('../openapi/client_libs/typescript/src/index.ts', import.meta.url)) } },
  build: {
    outDir: process.env['WEB_OUTPUT'] ?? '../diffusion_workers/web',
    emptyOutDir: true,
    target: 'es2022',
    cssTarget: ['chrome123', 'firefox120', 'safari17.5'],
    modulePreload: { polyfill: false },
    assetsInlineLimit: 8192,
    rollupOptions: { output: { entryFileNames: 'assets/page-[hash].js', assetFileNames: 'assets/page-[hash][extname]', codeSplitting: false } },
  },
  server: { proxy: Object.fromEntries(api.map((path) => [path, server])) },
});
