import { ConfigError } from './errors.js';

/** What a rank computes on: the machine's processors, or one of its GPUs, counted as CUDA does. */
export type Device = { readonly kind: 'cpu' } | { readonly kind: 'cuda'; readonly gpu: number };

/** @throws ConfigError it is neither `cpu` nor `cuda:N` */
export function parseDevice(text: string): Device {
  if (text === 'cpu') return { kind: 'cpu' };
  const gpu = /^cuda:(\d{1,3})$/.exec(text)?.[1];
  if (gpu === undefined) throw new ConfigError(`--device ${text}: a worker takes cpu or cuda:N, as in cuda:0`);
  return { kind: 'cuda', gpu: Number(gpu) };
}

export function formatDevice(device: Device): string {
  return device.kind === 'cpu' ? 'cpu' : `cuda:${device.gpu}`;
}
