import { defineConfig } from '@hey-api/openapi-ts';

export default defineConfig({
  input: '../../ez_diffusion_api.yaml',
  output: { path: process.env['OPENAPI_TS_OUTPUT'] ?? 'src/generated', importFileExtension: '.js' },
  plugins: ['@hey-api/client-fetch', { name: '@hey-api/typescript', enums: 'javascript' }, '@hey-api/sdk'],
});
